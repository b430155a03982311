"""Runs a variant's graph on a device: one file a runtime, and only that file imports it.

Nothing here loads pickled code: graphs are ONNX, weights are safetensors for a registered architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from tasks.models.files import runtime_code

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Placed:
    """A variant on its device, ready to be loaded.

    `files` maps each role in the variant's `artefacts` to a verified local file. `device` is the address that
    the runtime understands: `cpu`, `cuda:0`, `tpu:0`. `compiled` is a folder that keeps what the runtime compiles for
    devices such as this one between processes, if anything does. `memory` is the most bytes that a process of the
    variant's own may hold on the host, 0 for no limit. `folder` is the model's, whose code comes first.
    """

    variant: str
    precision: str
    entry: str
    files: Mapping[str, Path]
    device: str
    threads: int = 1
    compiled: Path | None = None
    memory: int = 0
    folder: str = ""


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


@dataclass(frozen=True, slots=True)
class Watch:
    """Who waits for a row of the job, and for how long: `wanted` is asked some fifty times a second while it runs.

    `seconds` is the most that the row may take, and `limit` says what names that bound.
    """

    job: str
    wanted: Callable[[], bool]
    seconds: float
    limit: str


@runtime_checkable
class Interruptible(Protocol):
    """A runtime whose rows run one by one, in a process that can be ended while one runs."""

    @property
    def alive(self) -> bool:
        """Whether it still runs rows; else it is to be unloaded, and loaded again."""

    def watched(self, watch: Watch) -> Runtime:
        """The same runtime for the next row, which is ended as soon as `watch` says so.

        Its `run` takes one row, and raises `workers.calling.NotWantedError` if the row is no longer wanted. The
        cause of an `ExecutionError` is a `workers.calling.CallError`.
        """


class ModelLoadError(Exception):
    """A variant cannot be loaded here: a missing package, a bad file, not enough memory."""


def open_runtime(runtime: str, placed: Placed) -> Runtime:
    """The runtime of that name, one of ours or of an installed package, not yet loaded.

    An entry that ends in `decoder` is for generation: `workers.runtimes.stepping` says what its runtime adds.

    Raises:
        ModelLoadError: its package is not installed.
    """
    return import_runtime(runtime, placed.entry)(placed)


def import_runtime(runtime: str, entry: str) -> Callable[[Placed], Runtime]:
    """What opens variants that run `entry` on the runtime of that name; its packages are imported with it.

    Raises:
        ModelLoadError: its package is not installed.
    """
    try:
        opener: Callable[[Placed], Runtime] = runtime_code(runtime, entry).load()
    except ImportError as error:
        raise ModelLoadError(f"runtime {runtime!r} is not installed here: {error}") from error
    return opener
