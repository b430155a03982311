"""Registered torch networks over safetensors weights, on the CPU or on CUDA."""

from __future__ import annotations

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tasks.models.files import entry_code
from taxiway.errors import ExecutionError
from workers.decide.faults import text_of
from workers.port import Arrays, ModelLoadError, Placed

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRuntime:
    """The network that `build` in `<entry>_torch.py` makes of the file in the role `weights`, in one precision."""

    def __init__(self, placed: Placed) -> None:
        self._placed = placed
        self._device = torch.device(placed.device)
        self._dtype = _DTYPES[placed.precision]
        self._module: torch.nn.Module | None = None

    def load(self) -> None:
        """Build the network and bring it to the device. Raises `ModelLoadError`."""
        torch.set_num_threads(self._placed.threads)
        try:
            build = entry_code("torch", self._placed.entry, self._placed.folder).load()
            module: torch.nn.Module = build(load_file(self._placed.files["weights"]))
            self._module = module.to(self._device, self._dtype).eval()
        except (ImportError, KeyError, OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ModelLoadError(f"{self._placed.variant}: torch cannot load it: {text_of(error)}") from error

    def run(self, batch: Arrays) -> Arrays:
        """The network's outputs by name, floats as float32. Raises `ExecutionError`."""
        if self._module is None:
            raise ExecutionError(f"{self._placed.variant} is not loaded")
        try:
            with torch.inference_mode():
                outputs = self._module(**{name: self._tensor(array) for name, array in batch.items()})
                return {name: _array(tensor) for name, tensor in outputs.items()}
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ExecutionError(f"{self._placed.variant}: {text_of(error)}") from error

    def unload(self) -> None:
        """Drop the network and give its device memory back."""
        self._module = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> int:
        """Bytes of the network's parameters and buffers."""
        if self._module is None:
            return 0
        tensors = (*self._module.parameters(), *self._module.buffers())
        return sum(tensor.nbytes for tensor in tensors)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)


def _array(tensor: torch.Tensor) -> np.ndarray:
    found: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return found


def open_variant(placed: Placed) -> TorchRuntime:
    """The runtime for one variant, not yet loaded."""
    return TorchRuntime(placed)
