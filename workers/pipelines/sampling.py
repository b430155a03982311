"""The text of one row: which token is next, and where the text ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from taxiway.contract.deltas import Delta

FinishReason = Literal["stop", "length"]

_UNFINISHED = "\ufffd"  # the replacement character, to which an incomplete UTF-8 sequence decodes
_BLOCK = 256  # probabilities that are summed at a time


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """Parameters of a generation; temperature 0 is greedy.

    With `logprobs`, each token's logarithmic probability is kept, and those of that many likely ones.
    """

    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


def read_sampling(parameters: Mapping[str, Any]) -> SamplingParameters:
    """The sampling parameters in validated request parameters that include defaults."""
    return SamplingParameters(
        max_tokens=int(parameters["max_tokens"]),
        temperature=float(parameters["temperature"] or 0),
        seed=parameters.get("seed"),
        stop=tuple(parameters.get("stop") or ()),
        logprobs=parameters.get("logprobs"),
    )


class Detokenizer:
    """Incremental decoding of tokens to text. A character of several tokens appears with the last of them.

    Args:
        decode: tokens to text, with U+FFFD for an incomplete character. More tokens may only append text, and replace a
            U+FFFD at the end.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.text = ""
        self._decode = decode
        self._open: list[int] = []  # tokens since the last complete character
        self._taken = 0  # their characters that are in `text`

    def add(self, token: int) -> None:
        """Append a token."""
        self._open.append(token)
        decoded = self._decode(self._open)
        whole = decoded.removesuffix(_UNFINISHED)
        self.text += whole[self._taken :]
        self._taken = len(whole)
        if whole == decoded:
            self._open, self._taken = [], 0

    def end(self) -> None:
        """Flush what is incomplete: no more tokens follow."""
        self.text += self._decode(self._open)[self._taken :]
        self._open, self._taken = [], 0


class GeneratedText:
    """A growing text that detects its end.

    Args:
        sampling: the caller's parameters.
        ends: the end-of-text tokens; they are not part of the answer.
        decode: tokens to text, as for `Detokenizer`.

    `emitted` counts the characters that `new_text` returned. `logprobs` has each token's in OpenAI's form, if asked,
    and `sent` counts how often `new_logprobs` returned some.
    """

    def __init__(
        self, sampling: SamplingParameters, ends: frozenset[int], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.emitted = 0
        self.sent = 0
        self.logprobs: list[dict[str, Any]] = []
        self._passed = 0
        self._sampling = sampling
        self._ends = ends
        self._decode = decode
        self._detokenizer = Detokenizer(decode)
        self._random = np.random.default_rng(sampling.seed)
        self._searched = 0

    @property
    def text(self) -> str:
        """The text so far; the whole answer once `finish` is set."""
        return self._detokenizer.text

    @property
    def temperature(self) -> float:
        """The caller's temperature."""
        return self._sampling.temperature

    def draw(self) -> float:
        """The next random number in [0, 1), one per token."""
        return self._random.random()

    def take(self, token: int, logits: np.ndarray | None = None) -> None:
        """Append the next token, which was chosen by these logits."""
        if token in self._ends:
            self._end("stop")
            return
        self.tokens.append(token)
        if self._sampling.logprobs is not None and logits is not None:
            self.logprobs.append(self._logprobs_of(token, logits, self._sampling.logprobs))
        self._detokenizer.add(token)
        if not self._stopped() and len(self.tokens) >= self._sampling.max_tokens:
            self._end("length")

    def new_text(self) -> str:
        """The text since the last call that no further token can change."""
        stable = len(self.text) if self.finish else len(self.text) - open_end(self.text, self._sampling.stop)
        given = self.text[self.emitted : stable]
        self.emitted += len(given)
        return given

    def new_logprobs(self) -> tuple[Delta, ...]:
        """The logarithmic probabilities of the tokens since the last call, as a delta; nothing if there are none."""
        new, self._passed = self.logprobs[self._passed :], len(self.logprobs)
        self.sent += bool(new)
        return ({"logprobs": new},) if new else ()

    def _logprobs_of(self, token: int, logits: np.ndarray, most: int) -> dict[str, Any]:
        probabilities = log_probabilities(logits)
        likely = np.argsort(-probabilities, kind="stable")[:most].tolist()
        return {**self._one(token, probabilities), "top_logprobs": [self._one(one, probabilities) for one in likely]}

    def _one(self, token: int, probabilities: np.ndarray) -> dict[str, Any]:
        text = self._decode([token])
        spelt = None if _UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": float(probabilities[token]), "bytes": spelt}

    def _end(self, reason: FinishReason) -> None:
        self._detokenizer.end()
        if not self._stopped():
            self.finish = reason

    def _stopped(self) -> bool:
        """Cut the text at the first stop; returns whether there was one."""
        stops = self._sampling.stop
        if not stops:
            return False
        cut = cut_at(self.text, stops, self._searched)
        if cut is None:
            self._searched = max(0, len(self.text) - max(map(len, stops)) + 1)
            return False
        self._detokenizer.text = self.text[:cut]
        self.finish = "stop"
        return True


def choose(logits: np.ndarray, temperatures: Sequence[float], draws: Sequence[float]) -> list[int]:
    """Sample a token for each row of `logits` (rows, vocabulary), independently of the other rows.

    Greedy at temperature 0; otherwise the token at which the cumulative probability passes the row's draw in [0, 1).
    """
    tokens: list[int] = logits.argmax(axis=1).tolist()
    warm = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if warm:
        best = logits[warm, [tokens[row] for row in warm]]
        scaled = (logits[warm] - best[:, None]) / np.array([temperatures[row] for row in warm], np.float32)[:, None]
        for row, weights in zip(warm, np.exp(scaled, out=scaled), strict=True):
            tokens[row] = passed(weights, draws[row])
    return tokens


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """The logarithm of each token's probability, float64."""
    shifted = logits.astype(np.float64) - logits.max()
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return result


def passed(weights: np.ndarray, draw: float) -> int:
    """The index at which the cumulative weights pass `draw` of their sum.

    Blocks are summed first and only one is accumulated, which takes a fifth of the time for 49,152 weights.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    wanted = draw * sums[-1]
    block = int(np.searchsorted(sums, wanted, side="right"))
    within = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    place = np.searchsorted(within, wanted - (sums[block - 1] if block else 0.0), side="right")
    return block * _BLOCK + min(int(place), len(within) - 1)


def cut_at(text: str, stops: Sequence[str], start: int = 0) -> int | None:
    """The index of the first of `stops` in `text` from `start` on; None if there is none."""
    found = [place for stop in stops if (place := text.find(stop, start)) >= 0]
    return min(found, default=None)


def open_end(text: str, stops: Sequence[str]) -> int:
    """The number of characters at the end of `text` that may begin one of `stops`."""
    longest = max(map(len, stops), default=0)
    return next((n for n in range(min(longest - 1, len(text)), 0, -1) if _begins(text[-n:], stops)), 0)


def _begins(end: str, stops: Sequence[str]) -> bool:
    return any(stop.startswith(end) for stop in stops)
