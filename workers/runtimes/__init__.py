"""Runs a variant's graph on a device: one file a runtime, and only that file imports it.

Nothing here loads pickled code: graphs are ONNX, weights are safetensors for a registered architecture.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Placed:
    """A variant on its device, ready to be loaded.

    `files` maps each role in the variant's `artefacts` to a verified local file. `device` is the address that
    the runtime understands: `cpu`, `cuda:0`, `tpu:0`. `compiled` is a folder that keeps what the runtime compiles for
    devices such as this one between processes, if anything does.
    """

    variant: str
    precision: str
    entry: str
    files: Mapping[str, Path]
    device: str
    threads: int = 1
    compiled: Path | None = None


class Runtime(Protocol):
    """A graph that can be loaded, run and unloaded. Not thread-safe: one device thread calls it."""

    def load(self) -> None:
        """Bring the weights to the device. Raises `ModelLoadError`."""

    def run(self, batch: Arrays) -> Arrays:
        """Outputs by name for inputs by name; the first axis of every array is the batch.

        Raises:
            ExecutionError: the graph failed on this batch.
        """

    def unload(self) -> None:
        """Give the memory back. The runtime can be loaded again."""

    def memory(self) -> int:
        """Bytes that the loaded variant holds on the device, as far as the runtime can tell."""


class ModelLoadError(Exception):
    """A variant cannot be loaded here: a missing package, a bad file, not enough memory."""


def open_runtime(runtime: str, placed: Placed) -> Runtime:
    """The runtime of that name (`onnx`, `torch`, `jax`, `python`, `echo`), not yet loaded.

    An entry that ends in `decoder` is for generation: `workers.runtimes.stepping` says what its runtime adds.

    Raises:
        ModelLoadError: its package is not installed.
    """
    opened: Runtime = import_runtime(runtime, placed.entry).open_variant(placed)
    return opened


def import_runtime(runtime: str, entry: str) -> Any:
    """The module that runs `entry` on the runtime of that name; its packages are imported with it.

    Raises:
        ModelLoadError: its package is not installed.
    """
    name = f"{runtime}_decoder" if entry.endswith("decoder") else runtime
    try:
        return importlib.import_module(f"workers.runtimes.{name}")
    except ImportError as error:
        raise ModelLoadError(f"runtime {runtime!r} is not installed here: {error}") from error
