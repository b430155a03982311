"""ONNX graphs on ONNX Runtime: on the CPU, or on CUDA if its build has the provider.

An `entry` that ends in `decoder` is for generation, on the CPU: a graph that reads tokens into a cache, which it may
write in place. `workers/recipes/smollm2_onnx.py` describes the graph's inputs and outputs. Its caches are kept here in
host memory, as arrays of shape (rows, kv heads, capacity, head width) for each layer's keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from taxiway.errors import ExecutionError
from workers.decide.faults import text_of
from workers.port import Arrays, ModelLoadError, Placed, SlotDecoder


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
            raise ModelLoadError(
                f"{self._placed.variant}: onnxruntime cannot open the graph: {text_of(error)}"
            ) from error

    def run(self, batch: Arrays) -> Arrays:
        """Every output of the graph by name. Raises `ExecutionError`."""
        session = self._opened()
        try:
            outputs: list[np.ndarray] = session.run(None, dict(batch))
        except Exception as error:  # onnxruntime's errors share no narrower base
            raise ExecutionError(f"{self._placed.variant}: {text_of(error)}") from error
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, outputs, strict=True))

    def unload(self) -> None:
        """Close the session."""
        self._session = None

    def memory(self) -> int:
        """The graph file's bytes, which its weights nearly are: ONNX Runtime does not tell its own."""
        return self._bytes if self._session else 0

    def _opened(self) -> ort.InferenceSession:
        if self._session is None:
            raise ExecutionError(f"{self._placed.variant} is not loaded")
        return self._session


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
    return options


def open_variant(placed: Placed) -> OnnxRuntime:
    """The runtime for one variant, not yet loaded."""
    return OnnxRuntime(placed)


_BLOCK = 128  # tokens by which the caches' capacity grows


class OnnxDecoder(SlotDecoder, OnnxRuntime):
    """One session and its caches; row i of every cache holds the slot `_rows[i]`."""

    def __init__(self, placed: Placed) -> None:
        SlotDecoder.__init__(self)
        OnnxRuntime.__init__(self, placed)
        self._presents: dict[str, str] = {}
        self._caches: dict[str, np.ndarray] = {}
        self._held = self._capacity = 0  # rows and tokens that the caches have room for
        self._rows: list[int] = []

    def load(self) -> None:
        """Open the graph. Raises `ModelLoadError`, also for a device other than the CPU."""
        if not self._placed.device.startswith("cpu"):
            reason = f"its caches are in host memory: expected device 'cpu', got {self._placed.device!r}"
            raise ModelLoadError(f"{self._placed.variant}: {reason}")
        super().load()
        notes = self._opened().get_modelmeta().custom_metadata_map
        if "in_place" not in notes:
            raise ModelLoadError(f"{self._placed.variant}: the graph has no note 'in_place': it is no decoder")
        self._presents = {past: present for present, past in json.loads(notes["in_place"]).items()}
        self._drop()

    def unload(self) -> None:
        """Close the session and drop the caches."""
        super().unload()
        self._drop()

    def memory(self) -> int:
        """The graph's bytes and the caches'."""
        return super().memory() + sum(cache.nbytes for cache in self._caches.values())

    def _read(self, slots: Sequence[int], ids: np.ndarray, last: np.ndarray) -> np.ndarray:
        self._rows += [slot for slot in slots if slot not in self._rows]
        self._grow(len(self._rows), max(int(last.max()) + 1, ids.shape[1]))
        start = self._gather(slots)
        order = [slots.index(slot) for slot in self._rows[start : start + len(slots)]]
        read = self._run_rows(ids[order], last[order], start)
        logits = np.empty_like(read)
        logits[order] = read
        return logits

    def _forget(self, slots: Sequence[int]) -> None:
        if not self._lengths:
            self._drop()
            return
        for slot in slots:
            if slot in self._rows:
                self._fill(self._rows.index(slot))
        wanted = _blocks(max(self._lengths.values()))
        if self._capacity > 2 * wanted:
            self._allocate(self._held, wanted)

    def _drop(self) -> None:
        self._rows = []
        self._caches = {}
        self._held = self._capacity = 0

    def _fill(self, hole: int) -> None:
        """Drop the row at `hole`: the last one takes its place, so that rows lie side by side."""
        last = len(self._rows) - 1
        slot = self._rows.pop()
        if hole < last:
            self._rows[hole], length = slot, self._lengths.get(slot, 0)
            for cache in self._caches.values():
                cache[hole, :, :length] = cache[last, :, :length]

    def _grow(self, rows: int, tokens: int) -> None:
        """Make room. Rows are doubled and tokens grow in blocks, so that what is there is copied seldom."""
        if rows > self._held or tokens > self._capacity:
            held = 1 << (rows - 1).bit_length()  # memory of a row that nothing was written to is not taken
            self._allocate(max(self._held, held), max(self._capacity, _blocks(tokens)))

    def _allocate(self, held: int, capacity: int) -> None:
        """New caches with what the rows have."""
        used, kept = min(self._held, len(self._rows)), min(self._capacity, capacity)
        for spec in self._opened().get_inputs():
            if spec.name in self._presents:
                _, heads, _, width = spec.shape
                new = np.zeros((held, heads, capacity, width), np.float32)
                if used:
                    new[:used, :, :kept] = self._caches[spec.name][:used, :, :kept]
                self._caches[spec.name] = new
        self._held, self._capacity = held, capacity

    def _gather(self, slots: Sequence[int]) -> int:
        """The first row of these slots, which are brought side by side where they are not."""
        rows = sorted(self._rows.index(slot) for slot in slots)
        if rows[-1] - rows[0] + 1 == len(rows):
            return rows[0]
        for place, slot in enumerate(slots):
            self._swap(place, self._rows.index(slot))
        return 0

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]
            for cache in self._caches.values():
                cache[[one, other]] = cache[[other, one]]

    def _run_rows(self, ids: np.ndarray, last: np.ndarray, start: int) -> np.ndarray:
        """Logits of consecutive rows; the caches are bound as inputs and as outputs."""
        session = self._opened()
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("last", last)
        for past, present in self._presents.items():
            cache = self._caches[past][start : start + len(ids)]
            binding.bind_cpu_input(past, cache)
            binding.bind_output(present, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
        binding.bind_output("logits", "cpu")
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors share no narrower base
            raise ExecutionError(f"{self._placed.variant}: {text_of(error)}") from error
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits


def _blocks(tokens: int) -> int:
    return -(-tokens // _BLOCK) * _BLOCK


def open_decoder(placed: Placed) -> OnnxDecoder:
    """The runtime for one variant, not yet loaded."""
    return OnnxDecoder(placed)
