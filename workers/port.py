"""What a runtime and a pipeline implement, and how those that a variant names are opened.

A runtime runs a variant's graph on a device. A pipeline converts a request's rows to tensors, runs batches of them on a
runtime, and converts tensors to answers.

A stepping runtime generates: it remembers what each slot has read, and gives the logits of its next token. A variant
whose `entry` ends in `decoder` runs on one, which the runtime's `open_decoder` makes. A slot is a number that the
caller gives to a sequence while it is held; slots may be admitted while others are in the middle of theirs.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tasks.models.files import runtime_code
from tasks.models.model import Model, Variant

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

        Its `run` takes one row, and raises `calling.channel.NotWantedError` if the row is no longer wanted. The
        cause of an `ExecutionError` is a `calling.channel.CallError`.
        """


class ModelLoadError(Exception):
    """A variant cannot be loaded here: a missing package, a bad file, not enough memory."""


def open_runtime(runtime: str, placed: Placed) -> Runtime:
    """The runtime of that name, one of ours or of an installed package, not yet loaded.

    An entry that ends in `decoder` is for generation: `SteppingRuntime` says what its runtime adds.

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


MAX_PREFILL = 4096
"""Most tokens, padding included, that prompts are read in at once: bounds what activations take in memory."""


class SteppingRuntime(Runtime, Protocol):
    """A runtime for generation. Logits are float32 of shape (slots, vocabulary), in the order of the slots given."""

    def admit(self, slots: Sequence[int], prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Read a prompt (int64 tokens, at least one), or its beginning, into each slot, which forgets what it held."""

    def extend(self, slot: int, tokens: np.ndarray) -> np.ndarray:
        """Read more of its prompt into one slot; its logits, of shape (1, vocabulary)."""

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Read one more token into each of these slots; other slots keep what they hold."""

    def evict(self, slots: Sequence[int]) -> None:
        """Forget these slots and give their memory back."""


class SlotDecoder(ABC):
    """What such runtimes share: positions by slot, and prompts padded together in groups."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}

    def admit(self, slots: Sequence[int], prompts: Sequence[np.ndarray]) -> np.ndarray:
        """See `SteppingRuntime.admit`."""
        read = []
        for start, end in _groups([len(prompt) for prompt in prompts]):
            lengths = [len(prompt) for prompt in prompts[start:end]]
            ids = np.zeros((end - start, max(lengths)), np.int64)
            for row, prompt in zip(ids, prompts[start:end], strict=True):
                row[: len(prompt)] = prompt
            self._lengths |= dict(zip(slots[start:end], lengths, strict=True))
            read.append(self._read(slots[start:end], ids, np.array(lengths, np.int32) - 1))
        return np.concatenate(read)

    def extend(self, slot: int, tokens: np.ndarray) -> np.ndarray:
        """See `SteppingRuntime.extend`."""
        self._lengths[slot] += len(tokens)
        return self._read([slot], tokens[None].astype(np.int64), np.array([self._lengths[slot]], np.int32) - 1)

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """See `SteppingRuntime.step`."""
        last = np.array([self._lengths[slot] for slot in slots], np.int32)
        logits = self._read(slots, np.array(tokens, np.int64)[:, None], last)
        for slot in slots:
            self._lengths[slot] += 1
        return logits

    def evict(self, slots: Sequence[int]) -> None:
        """See `SteppingRuntime.evict`."""
        for slot in slots:
            self._lengths.pop(slot, None)
        self._forget(slots)

    @abstractmethod
    def _read(self, slots: Sequence[int], ids: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Logits after reading `ids` (slots, tokens); `last` is each last real token's position in its context.

        Rows of several tokens begin at the start of their context, but for a row alone, which goes on in its own.
        """

    @abstractmethod
    def _forget(self, slots: Sequence[int]) -> None:
        """Free what the slots hold; `_lengths` has only those that stay."""


def _groups(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of prompts, each padded to at most `MAX_PREFILL` tokens, or of one prompt."""
    start = 0
    for end in range(1, len(lengths) + 1):
        grown = lengths[start : end + 1]
        if end == len(lengths) or max(grown) * len(grown) > MAX_PREFILL:
            yield start, end
            start = end


Row = Mapping[str, Any]
"""One row of a request: a plain value (str, bytes, number, nested list or array) by input name."""


@dataclass(slots=True)
class Item:
    """A prepared row: arrays without the batch axis, its size in the units of buckets and profiles, and parameters.

    `level` is its job's priority level, which pipelines ignore. `starved` means that it ran out of memory once, in a
    process that had run other rows.
    """

    arrays: Arrays
    size: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
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
