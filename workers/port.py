"""What a runtime and a pipeline implement, and how those that a variant names are opened.

A runtime runs a variant's graph on a device. A pipeline converts a request's rows to tensors, runs batches of them on a
runtime, and converts tensors to answers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec
import numpy as np

from tasks.models.files import runtime_code
from tasks.models.model import Model, Variant

if TYPE_CHECKING:  # a process without workers has no psutil
    from workers.calling.child import FollowedRun

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Placed:
    """A variant on its device, ready to be loaded."""

    variant: str
    precision: str
    entry: str
    files: Mapping[str, Path]
    """A verified local file for each role in the variant's `artefacts`."""
    device: str
    """The address that the runtime understands: `cpu`, `cuda:0`, `tpu:0`."""
    threads: int = 1
    compiled: Path | None = None
    """A folder that keeps what the runtime compiles for such devices between processes, if it does."""
    memory: int = 0
    """Bytes that a process of the variant's own may hold on the host; 0 for no limit."""
    folder: str = ""
    """The model's, whose code comes first."""


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
class RowWatch:
    """Who waits for a row of the job, and for how long: `wanted` is asked some fifty times a second while it runs.

    `seconds` is the most that the row may take, and `limit` says what names that bound. Within `run`, given the digest
    of its callable, runs a callable that has a `Run`.
    """

    job: str
    wanted: Callable[[], bool]
    seconds: float
    limit: str
    run: Callable[[str], AbstractContextManager[FollowedRun]]


@runtime_checkable
class Interruptible(Protocol):
    """A runtime whose rows run one by one, in a process that can be ended while one runs.

    A row is ended as soon as `watch` says so, if there is one: `run` then raises `calling.channel.NotWantedError`. The
    cause of its `ExecutionError` is a `calling.channel.CallError`.
    """

    watch: RowWatch | None

    @property
    def alive(self) -> bool:
        """Whether it still runs rows; else it is to be unloaded, and loaded again."""


class ModelLoadError(Exception):
    """A variant cannot be loaded here: a missing package, a bad file, not enough memory."""


def import_runtime(runtime: str) -> Callable[[Placed], Runtime]:
    """What opens variants on the runtime of that name; its packages are imported with it.

    Raises:
        ModelLoadError: its package is not installed.
    """
    try:
        opener: Callable[[Placed], Runtime] = runtime_code(runtime).load()
    except ImportError as error:
        raise ModelLoadError(f"runtime {runtime!r} is not installed here: {error}") from error
    return opener


Row = Mapping[str, Any]
"""One row of a request: a plain value (str, bytes, number, nested list or array) by input name."""


class Item(msgspec.Struct):
    """A prepared row: arrays without the batch axis, its size in the units of buckets and profiles, and parameters.

    `level` is its job's priority level, which pipelines ignore. `starved` means that it ran out of memory once, in a
    process that had run other rows.
    """

    arrays: Arrays
    size: int
    parameters: Mapping[str, Any] = {}
    level: int = 0
    starved: bool = False


class Pipeline(Protocol):
    """Pre- and postprocessing of a model variant. `prepare` may run concurrently with `run`, on another thread."""

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """Convert a row to tensors.

        Raises:
            InvalidRequestError: the row is invalid; names the input.
        """

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """One answer per item, in order: plain JSON values or arrays by output name.

        Items share a size bucket. An `ExecutionError` applies to the whole batch.
        """


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> Pipeline:
    """The pipeline that `model` names, with its tokenizer, labels or head from the variant's files."""
    module = importlib.import_module(f"workers.pipelines.{model.pipeline}")
    opened: Pipeline = module.open_pipeline(model, variant, placed)
    return opened
