"""The running batch of a generation: rows join and leave between its steps, and each ends when it likes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from workers.pipelines import Item, Row
from workers.pipelines.sampling import Sequel, choose
from workers.runtimes.stepping import MAX_PREFILL, SteppingRuntime

MAX_HELD = 12_288
"""Most tokens of chats and answers that are held at once: they take 46 kB each in float32, 570 MB together."""

HOLD_UP = 0.1
"""Seconds, about, for which reading prompts may hold up the rows that go on, at each step: two steps' time of a CPU."""

FEWEST_READ = 64
"""Tokens of prompts that a step reads at least: in pieces of 64 each costs 6 % more than in large ones, of 16 56 %."""

_SMOOTHING = 0.3  # weight of the newest reading in the mean speed


@dataclass(slots=True, eq=False)
class RunningRow:
    """A row in a running batch.

    `read` counts the tokens of its prompt that were read, `turns` the steps that it was there for and `mates` the rows
    that were there with it, itself among them. `run_time` is those steps' seconds, and `device_time` its share of them.
    `error` is what ended it.
    """

    item: Item
    sequel: Sequel
    slot: int
    read: int = 0
    turns: int = 0
    mates: int = 0
    run_time: float = 0.0
    device_time: float = 0.0
    error: BaseException | None = None

    @property
    def prompt(self) -> np.ndarray:
        """Its tokens, int64."""
        return self.item.arrays["tokens"]

    @property
    def batch(self) -> int:
        """The mean number of rows that ran together with it."""
        return max(1, round(self.mates / max(self.turns, 1)))

    @property
    def left(self) -> float:
        """Seconds until it has as many tokens as it may have, at the pace of its steps so far."""
        tokens = self.item.size - len(self.prompt) - len(self.sequel.tokens)
        return tokens * self.run_time / max(self.turns, 1)

    @property
    def answer(self) -> Row:
        """`text`, `tokens` and `finish-reason`."""
        return {"text": self.sequel.text, "tokens": len(self.sequel.tokens), "finish-reason": self.sequel.finish}


class RunningBatch:
    """Rows that a runtime generates together. For one thread.

    If the runtime fails on several rows, each restarts alone, so that only the faulty rows fail.

    Args:
        begin: an empty sequel for a row.
        hold_up: seconds, about, of one step that reading prompts may take.
    """

    def __init__(self, runtime: SteppingRuntime, begin: Callable[[Item], Sequel], *, hold_up: float = HOLD_UP) -> None:
        self._runtime = runtime
        self._begin = begin
        self._hold_up = hold_up
        self._rows: list[RunningRow] = []
        self._suspects: list[RunningRow] = []
        self._speed = 0.0  # tokens of prompts read a second

    @property
    def rows(self) -> list[RunningRow]:
        """All rows that have not ended."""
        return [*self._rows, *self._suspects]

    def room(self, size: int) -> int:
        """How many more rows of up to `size` tokens may join; one always may where there is none."""
        if self._suspects:
            return 0
        largest = max([size, *(row.item.size for row in self._rows)])
        return max(MAX_HELD // largest - len(self._rows), 0 if self._rows else 1)

    def join(self, item: Item) -> RunningRow:
        """Take a row in. Prompts are read in the order in which rows joined."""
        taken = {row.slot for row in self._rows}
        row = RunningRow(item, self._begin(item), next(slot for slot in range(len(taken) + 1) if slot not in taken))
        self._rows.append(row)
        return row

    def leave(self, rows: Sequence[RunningRow]) -> None:
        """Drop rows; what they hold is given back."""
        self._runtime.evict([row.slot for row in rows if row in self._rows])
        self._rows = [row for row in self._rows if row not in rows]
        self._suspects = [row for row in self._suspects if row not in rows]

    def step(self) -> list[RunningRow]:
        """Give each row whose prompt is read one more token, then read some of the other prompts.

        Returns:
            The rows that ended with that; they have left.
        """
        if not self._rows and self._suspects:
            self._rows = [self._suspects.pop(0)]
        began, present = time.perf_counter(), list(self._rows)
        ended = self._step()
        for row in present:
            row.turns += 1
            row.mates += len(present)
            row.run_time += time.perf_counter() - began
        return ended

    def _step(self) -> list[RunningRow]:
        going = [row for row in self._rows if row.read == len(row.prompt)]
        ended = self._guarded(going, self._advance) if going else []
        unread = [row for row in self._rows if row.read < len(row.prompt)]
        return ended + self._guarded(self._next_to_read(unread), self._read) if unread else ended

    def _guarded(self, rows: list[RunningRow], run: Callable[[list[RunningRow]], list[RunningRow]]) -> list[RunningRow]:
        """The rows that ended as `run` ran over these, which pay for it."""
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
        """Restart rows, each alone; a row that already ran alone fails."""
        if len(rows) == 1 and len(self._rows) == 1:
            rows[0].error = error
            return rows
        self.leave(rows)
        for row in rows:
            row.sequel, row.slot, row.read = self._begin(row.item), 0, 0
        self._suspects += rows
        return []

    def _advance(self, going: list[RunningRow]) -> list[RunningRow]:
        logits = self._runtime.step([row.slot for row in going], [row.sequel.tokens[-1] for row in going])
        return _take(going, logits)

    def _next_to_read(self, unread: list[RunningRow]) -> list[RunningRow]:
        """The rows that are read now: some whose prompts are read whole, or one of whose a piece is."""
        group, most = unread[:1], self._most_read()
        for row in unread[1:]:
            if group[0].read or max(len(r.prompt) for r in (*group, row)) * (len(group) + 1) > most:
                break
            group.append(row)
        return group

    def _read(self, rows: list[RunningRow]) -> list[RunningRow]:
        pieces = [row.prompt[row.read : row.read + self._most_read()] for row in rows]
        began = time.perf_counter()
        if rows[0].read:
            logits = self._runtime.extend(rows[0].slot, pieces[0])
        else:
            logits = self._runtime.admit([row.slot for row in rows], pieces)
        speed = sum(map(len, pieces)) / max(time.perf_counter() - began, 1e-9)
        for row, piece in zip(rows, pieces, strict=True):
            row.read += len(piece)
        self._speed += (_SMOOTHING if self._speed else 1.0) * (speed - self._speed)
        return _take(rows, logits) if rows[0].read == len(rows[0].prompt) else []

    def _most_read(self) -> int:
        """Tokens of prompts that one step reads."""
        return min(max(FEWEST_READ, int(self._speed * self._hold_up)), MAX_PREFILL)


def _take(rows: Sequence[RunningRow], logits: np.ndarray) -> list[RunningRow]:
    """Give each row its next token; those that ended with it."""
    sequels = [row.sequel for row in rows]
    draws = [sequel.draw() if sequel.temperature else 0.0 for sequel in sequels]
    for sequel, token in zip(sequels, choose(logits, [s.temperature for s in sequels], draws), strict=True):
        sequel.take(token)
    return [row for row in rows if row.sequel.finish]
