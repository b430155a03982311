"""Which token comes next, and when a text is finished: decisions of one sequence, whatever its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a caller may ask of a generation; a temperature of 0 always takes the likeliest token."""

    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


def read_wishes(parameters: Mapping[str, Any]) -> Wishes:
    """The wishes that checked parameters, with their defaults, express."""
    return Wishes(
        max_tokens=int(parameters["max_tokens"]),
        temperature=float(parameters["temperature"] or 0),
        seed=parameters.get("seed"),
        stop=tuple(parameters.get("stop") or ()),
    )


class Sequel:
    """One growing text: takes logits, chooses tokens, and knows when it is finished.

    Args:
        wishes: what the caller asked.
        ends: the tokens that end a text; they belong to no answer.
        decode: tokens to text.
    """

    def __init__(self, wishes: Wishes, ends: frozenset[int], decode: Callable[[Sequence[int]], str]) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish: FinishReason | None = None
        self._wishes = wishes
        self._ends = ends
        self._decode = decode
        self._random = np.random.default_rng(wishes.seed)

    def take(self, logits: np.ndarray) -> None:
        """Choose the next token from `logits` (vocabulary); once `finish` is set, `text` is whole."""
        token = choose(logits, self._wishes.temperature, self._random.random())
        if token in self._ends:
            self._end("stop", self._decode(self.tokens))
            return
        self.tokens.append(token)
        if self._wishes.stop and (cut := cut_at(text := self._decode(self.tokens), self._wishes.stop)) is not None:
            self._end("stop", text[:cut])
        elif len(self.tokens) >= self._wishes.max_tokens:
            self._end("length", self._decode(self.tokens))

    def _end(self, reason: FinishReason, text: str) -> None:
        self.finish = reason
        self.text = text


def choose(logits: np.ndarray, temperature: float, draw: float) -> int:
    """The likeliest token at temperature 0, else the one at which the cumulated probability passes `draw` in [0, 1)."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    cumulated = np.exp(scaled).cumsum()
    return int(np.searchsorted(cumulated, draw * cumulated[-1], side="right"))


def cut_at(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of `stops` begins in `text`; None where there is none."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=None)
