"""ONNX graphs on ONNX Runtime: on the CPU, or on CUDA if its build has the provider."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from taxiway.errors import ExecutionError
from workers.decide.faults import text_of
from workers.port import Arrays, ModelLoadError, Placed


class OnnxRuntime:
    """One `InferenceSession` over the file in the role `graph`."""

    def __init__(self, placed: Placed) -> None:
        self._placed = placed
        self._session: ort.InferenceSession | None = None
        self._bytes = 0

    def load(self) -> None:
        """Open the graph on the device. Raises `ModelLoadError`."""
        ort.disable_telemetry_events()
        try:
            self._bytes = self._placed.files["graph"].stat().st_size  # now: the file may be replaced or removed later
            self._session = ort.InferenceSession(
                self._placed.files["graph"], _options(self._placed.threads), providers=providers(self._placed.device)
            )
        except Exception as error:  # onnxruntime's errors share no narrower base
            raise ModelLoadError(f"{self._placed.variant}: onnxruntime cannot open it: {text_of(error)}") from error

    def run(self, batch: Arrays) -> Arrays:
        """Every output of the graph by name. Raises `ExecutionError`."""
        if self._session is None:
            raise ExecutionError(f"{self._placed.variant} is not loaded")
        try:
            outputs: list[np.ndarray] = self._session.run(None, dict(batch))
        except Exception as error:  # onnxruntime's errors share no narrower base
            raise ExecutionError(f"{self._placed.variant}: {text_of(error)}") from error
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, outputs, strict=True))

    def unload(self) -> None:
        """Close the session."""
        self._session = None

    def memory(self) -> int:
        """The graph file's bytes, which its weights nearly are: ONNX Runtime does not tell its own."""
        return self._bytes if self._session else 0


def providers(device: str) -> list[str | tuple[str, dict[str, str]]]:
    """The execution providers for a device's address, named explicitly: the wheel also lists remote ones.

    Raises:
        ModelLoadError: this build of ONNX Runtime has none for the device.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if kind == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
        return [("CUDAExecutionProvider", {"device_id": index or "0"}), "CPUExecutionProvider"]
    raise ModelLoadError(f"onnxruntime has no execution provider for {device!r} here: {ort.get_available_providers()}")


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning pool takes the cores that the other workers of this machine compute on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI, sums of unsigned by signed products overflow: int8 is then computed unsigned by unsigned.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def open_variant(placed: Placed) -> OnnxRuntime:
    """The runtime for one variant, not yet loaded."""
    return OnnxRuntime(placed)
