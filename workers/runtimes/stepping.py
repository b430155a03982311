"""Runtimes that generate: they remember what each slot has read, and give the logits of its next token.

A variant whose `entry` ends in `decoder` runs on one, which the runtime's `open_decoder` makes. A slot is a number that
the caller gives to a sequence while it is held; slots may be admitted while others are in the middle of theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from workers.runtimes import Runtime

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
