"""Registered JAX networks over safetensors weights: the TPU's runtime, and on the CPU where there is none.

JAX compiles once for every shape. Batches are padded to a power of two here, and other axes to a bucket by the
pipeline, so that few shapes occur. Compiled programs are kept between processes, however short their compilation: in
the folder `JAX_COMPILATION_CACHE_DIR`, which JAX reads itself, else in the worker's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tasks.models.files import entry_code
from taxiway.errors import ExecutionError
from workers.decide.faults import text_of
from workers.port import Arrays, ModelLoadError, Placed

Tensors = Mapping[str, jax.Array]

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class JaxRuntime:
    """The function `apply` of `<entry>_jax.py`, compiled, with the file in the role `weights`."""

    def __init__(self, placed: Placed) -> None:
        self._placed = placed
        self._weights: dict[str, jax.Array] = {}
        self._apply: Callable[[Tensors, Tensors], Tensors] | None = None

    def load(self) -> None:
        """Bring the weights to the device; compilation waits for the first batch. Raises `ModelLoadError`."""
        if self._placed.compiled is not None and jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(self._placed.compiled / "jax"))
        os.environ["NPROC"] = str(self._placed.threads)  # the only thread limit that JAX's CPU device knows
        try:
            apply = entry_code("jax", self._placed.entry, self._placed.folder).load()
            self._weights = jax.device_put(load_file(self._placed.files["weights"]), _device(self._placed.device))
            self._apply = jax.jit(apply)
        except (ImportError, KeyError, OSError, RuntimeError, ValueError, IndexError, SafetensorError) as error:
            raise ModelLoadError(f"{self._placed.variant}: JAX cannot load it: {text_of(error)}") from error

    def run(self, batch: Arrays) -> Arrays:
        """The network's outputs by name, for as many rows as came. Raises `ExecutionError`."""
        if self._apply is None:
            raise ExecutionError(f"{self._placed.variant} is not loaded")
        rows = len(next(iter(batch.values())))
        try:
            with jax.default_device(_device(self._placed.device)):
                outputs = self._apply(self._weights, {name: pad_rows(array) for name, array in batch.items()})
            return {name: np.asarray(array)[:rows] for name, array in outputs.items()}
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise ExecutionError(f"{self._placed.variant}: {text_of(error)}") from error

    def unload(self) -> None:
        """Drop the weights and the compiled programs."""
        self._weights = {}
        self._apply = None

    def memory(self) -> int:
        """Bytes of the weights on the device."""
        return sum(array.nbytes for array in self._weights.values())


def pad_rows(array: np.ndarray) -> np.ndarray:
    """The array with rows of zeros up to the next power of two; 64-bit integers become 32-bit ones, as JAX has them."""
    rows = len(array)
    wanted = 1 << (rows - 1).bit_length()
    narrow = array.astype(np.int32) if array.dtype == np.int64 else array
    return np.pad(narrow, [(0, wanted - rows)] + [(0, 0)] * (array.ndim - 1))


def _device(address: str) -> jax.Device:
    kind, _, index = address.partition(":")
    return jax.devices(kind)[int(index or 0)]


def open_variant(placed: Placed) -> JaxRuntime:
    """The runtime for one variant, not yet loaded."""
    return JaxRuntime(placed)
