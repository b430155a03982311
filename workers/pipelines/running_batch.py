"""The batch of a generating variant: rows join and leave it between steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from workers.pipelines.sampling import GeneratedText, choose
from workers.port import MAX_PREFILL, Item, Row, SteppingRuntime

MAX_HELD = 12_288
"""Most tokens of prompts and answers in the key-value cache: 46 kB each in float32, 570 MB in total."""

PREFILL_TIME = 0.1
"""Approximate seconds of prefill per step, which delay the rows that decode: the time of two steps on a CPU."""

MIN_PREFILL = 64
"""Least prompt tokens per step: in pieces of 64 a token costs 6 % more than in large ones, in pieces of 16 56 %."""

_SMOOTHING = 0.3  # weight of the newest measurement in the mean speed


@dataclass(slots=True, eq=False)
class RunningRow:
    """A row in a running batch.

    `prefilled` counts the prompt's tokens in the cache, `steps` the steps that the row was in the batch, and `batched`
    the rows of those steps, itself included. `run_time` is those steps' seconds, and `device_time` its share of them.
    `error` is the failure that ended it.
    """

    item: Item
    generated: GeneratedText
    slot: int
    prefilled: int = 0
    steps: int = 0
    batched: int = 0
    run_time: float = 0.0
    device_time: float = 0.0
    error: BaseException | None = None

    @property
    def prompt(self) -> np.ndarray:
        """The prompt's tokens, int64."""
        return self.item.arrays["tokens"]

    @property
    def batch(self) -> int:
        """The mean batch size over its steps."""
        return max(1, round(self.batched / max(self.steps, 1)))

    @property
    def left(self) -> float:
        """Seconds until it reaches its token limit, at the pace of its steps so far."""
        tokens = self.item.size - len(self.prompt) - len(self.generated.tokens)
        return tokens * self.run_time / max(self.steps, 1)

    @property
    def answer(self) -> Row:
        """`text`, `tokens`, `finish-reason`, `usage` and `logprobs`; and, for a chat, the assistant's `message`."""
        text, asked, tokens = self.generated.text, len(self.prompt), len(self.generated.tokens)
        told = {"logprobs": {"content": self.generated.logprobs}} if self.generated.logprobs else {}
        return {
            "logprobs": None,
            **told,
            "text": text,
            "tokens": tokens,
            "finish-reason": self.generated.finish,
            "message": {"role": "assistant", "content": text, **told},
            "usage": {"prompt_tokens": asked, "completion_tokens": tokens, "total_tokens": asked + tokens},
        }


class RunningBatch:
    """Rows that a runtime generates together. For one thread.

    If the runtime fails on several rows, each restarts alone, so only the faulty rows fail.

    Args:
        begin: makes an empty text for a row.
        prefill_time: approximate seconds of prefill per step.
    """

    def __init__(
        self, runtime: SteppingRuntime, begin: Callable[[Item], GeneratedText], *, prefill_time: float = PREFILL_TIME
    ) -> None:
        self._runtime = runtime
        self._begin = begin
        self._prefill_time = prefill_time
        self._rows: list[RunningRow] = []
        self._suspects: list[RunningRow] = []
        self._speed = 0.0  # prompt tokens per second

    @property
    def rows(self) -> list[RunningRow]:
        """All rows that have not ended."""
        return [*self._rows, *self._suspects]

    def room(self, size: int) -> int:
        """How many more rows of up to `size` tokens may join; at least one if the batch is empty."""
        if self._suspects:
            return 0
        largest = max([size, *(row.item.size for row in self._rows)])
        return max(MAX_HELD // largest - len(self._rows), 0 if self._rows else 1)

    def join(self, item: Item) -> RunningRow:
        """Add a row. Prompts are prefilled in the order in which rows joined."""
        taken = {row.slot for row in self._rows}
        row = RunningRow(item, self._begin(item), next(slot for slot in range(len(taken) + 1) if slot not in taken))
        self._rows.append(row)
        return row

    def leave(self, rows: Sequence[RunningRow]) -> None:
        """Remove rows and free their cache."""
        self._runtime.evict([row.slot for row in rows if row in self._rows])
        self._rows = [row for row in self._rows if row not in rows]
        self._suspects = [row for row in self._suspects if row not in rows]

    def step(self) -> list[RunningRow]:
        """Decode one token for each row whose prompt is prefilled, then prefill some of the other prompts.

        Returns:
            The rows that ended in this step; they have left the batch.
        """
        if not self._rows and self._suspects:
            self._rows = [self._suspects.pop(0)]
        began, present = time.perf_counter(), list(self._rows)
        ended = self._step()
        for row in present:
            row.steps += 1
            row.batched += len(present)
            row.run_time += time.perf_counter() - began
        return ended

    def _step(self) -> list[RunningRow]:
        decoding = [row for row in self._rows if row.prefilled == len(row.prompt)]
        ended = self._guarded(decoding, self._decode) if decoding else []
        waiting = [row for row in self._rows if row.prefilled < len(row.prompt)]
        return ended + self._guarded(self._next_to_prefill(waiting), self._prefill) if waiting else ended

    def _guarded(self, rows: list[RunningRow], run: Callable[[list[RunningRow]], list[RunningRow]]) -> list[RunningRow]:
        """The rows that ended while `run` ran over `rows`, which share its device time."""
        began = time.perf_counter()
        try:
            ended = run(rows)
        except BaseException as error:  # a runtime may raise anything
            ended = self._suspect(rows, error)
        seconds = time.perf_counter() - began
        for row in rows:
            row.device_time += seconds / len(rows)
        if ended:
            self.leave(ended)
        return ended

    def _suspect(self, rows: list[RunningRow], error: BaseException) -> list[RunningRow]:
        """Restart each row alone; a row that already ran alone fails."""
        if len(rows) == 1 and len(self._rows) == 1:
            rows[0].error = error
            return rows
        self.leave(rows)
        for row in rows:
            row.generated, row.slot, row.prefilled = self._begin(row.item), 0, 0
        self._suspects += rows
        return []

    def _decode(self, decoding: list[RunningRow]) -> list[RunningRow]:
        logits = self._runtime.step([row.slot for row in decoding], [row.generated.tokens[-1] for row in decoding])
        return _take(decoding, logits)

    def _next_to_prefill(self, waiting: list[RunningRow]) -> list[RunningRow]:
        """The rows to prefill next: several with whole prompts, or one with a piece of its prompt."""
        group, most = waiting[:1], self._prefill_size()
        for row in waiting[1:]:
            if group[0].prefilled or max(len(r.prompt) for r in (*group, row)) * (len(group) + 1) > most:
                break
            group.append(row)
        return group

    def _prefill(self, rows: list[RunningRow]) -> list[RunningRow]:
        pieces = [row.prompt[row.prefilled : row.prefilled + self._prefill_size()] for row in rows]
        began = time.perf_counter()
        if rows[0].prefilled:
            logits = self._runtime.extend(rows[0].slot, pieces[0])
        else:
            logits = self._runtime.admit([row.slot for row in rows], pieces)
        speed = sum(map(len, pieces)) / max(time.perf_counter() - began, 1e-9)
        for row, piece in zip(rows, pieces, strict=True):
            row.prefilled += len(piece)
        self._speed += (_SMOOTHING if self._speed else 1.0) * (speed - self._speed)
        return _take(rows, logits) if rows[0].prefilled == len(rows[0].prompt) else []

    def _prefill_size(self) -> int:
        """Prompt tokens per step."""
        return min(max(MIN_PREFILL, int(self._speed * self._prefill_time)), MAX_PREFILL)


def _take(rows: Sequence[RunningRow], logits: np.ndarray) -> list[RunningRow]:
    """Append each row's next token; returns the rows that ended with it."""
    texts = [row.generated for row in rows]
    draws = [generated.draw() if generated.temperature else 0.0 for generated in texts]
    chosen = choose(logits, [s.temperature for s in texts], draws)
    for generated, token, row in zip(texts, chosen, logits, strict=True):
        generated.take(token, row)
    return [row for row in rows if row.generated.finish]
