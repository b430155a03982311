"""In-flight batches of stepwise generation, one per variant, which rows join and leave.

Between two steps, whole batches of other variants may run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from taxiway.contract.job import Piece
from taxiway.errors import TaxiwayError
from workers.executor import Executor, Loaded, as_ours
from workers.pipelines.running import RunningBatch, RunningRow
from workers.runtimes import Runtime
from workers.stages.decode import named_row
from workers.stages.job import Job
from workers.stages.lane import Portions
from workers.stages.queues import PieceQueue


@runtime_checkable
class Stepwise(Protocol):
    """A pipeline whose rows join and leave a running batch."""

    def begin(self, runtime: Runtime) -> RunningBatch:
        """An empty batch."""


@dataclass(slots=True)
class _Running:
    """A variant's running batch, with the job and row index of each of its rows."""

    loaded: Loaded
    batch: RunningBatch
    owners: dict[RunningRow, tuple[Job, int]] = field(default_factory=dict)


class InFlight:
    """All in-flight batches of a device. Device thread only, unless stated.

    Args:
        stream: receives the pieces of streamed answers.

        `rows` counts the running rows; any thread may read it.
    """

    def __init__(self, executor: Executor, stream: PieceQueue) -> None:
        self._executor = executor
        self._stream = stream
        self._running: dict[str, _Running] = {}
        self.rows = 0

    def jobs(self) -> set[Job]:
        """The jobs with rows here."""
        return {job for running in self._running.values() for job, _ in running.owners.values()}

    def serve(self, loaded: Loaded) -> bool:
        """Start to serve the variant here, if it runs stepwise; whether it does."""
        if not isinstance(loaded.pipeline, Stepwise):
            return False
        running = self._running.get(loaded.key)
        if running is None or running.loaded is not loaded:  # the variant was reloaded since
            self._running[loaded.key] = _Running(loaded, loaded.pipeline.begin(loaded.runtime))
        return True

    def retire(self) -> None:
        """Let running rows of variants that left the catalogue finish, and admit no new ones."""
        for key, running in list(self._running.items()):
            loaded = running.loaded
            if self._executor.ready(loaded.model, loaded.key.partition("/")[2]) is not loaded:
                del self._running[key]
                if running.owners:
                    self._running[f"{loaded.key}#{id(running):x}"] = running

    def serves(self, key: str) -> bool:
        """Whether the variant with this key is served here."""
        return key in self._running

    def room(self, key: str, size: int, *, alone: bool = False) -> int:
        """How many more rows of a served variant, of up to `size` tokens, may join now.

        No row joins a suspect job, whose worker crashed, and rows of a suspect job (`alone`) join no others.
        """
        running = self._running[key]
        if running.owners and (alone or any(job.delivery.suspect for job, _ in running.owners.values())):
            return 0
        return min(running.batch.room(size), self._executor.max_batch(running.loaded) - len(running.owners))

    def join(self, key: str, portions: Portions) -> None:
        """Add rows of a served variant to its batch from the next step on."""
        running = self._running[key]
        self._executor.used(running.loaded)
        for job, rows in portions:
            for index in rows:
                running.owners[running.batch.join(job.items[index])] = job, index
        self._counted(running)

    def step(self) -> list[tuple[Job, TaxiwayError | None]]:
        """Run one step of the next batch in turn; returns the jobs that ended, with their errors if they failed."""
        key = next(key for key, running in self._running.items() if running.owners)
        running = self._running[key] = self._running.pop(key)
        began = time.monotonic()
        ended = running.batch.step()
        seconds = time.monotonic() - began
        for job in {job for job, _ in running.owners.values()}:
            job.run_time += seconds
        self._stream_pieces(running, ended)
        finished = [end for row in ended if row in running.owners and (end := self._end(running, row))]
        self._counted(running)
        return finished

    def late(self, left: float) -> set[Job]:
        """The jobs that may take longer than `left` seconds; an answer's length is unknown until its end."""
        return {
            job for running in self._running.values() for row, (job, _) in running.owners.items() if row.left > left
        }

    def drop(self, job: Job) -> None:
        """Remove a job's rows, finished or not."""
        for running in self._running.values():
            rows = [row for row, (owner, _) in running.owners.items() if owner is job]
            running.batch.leave(rows)
            for row in rows:
                del running.owners[row]
            self._counted(running)

    def _end(self, running: _Running, row: RunningRow) -> tuple[Job, TaxiwayError | None] | None:
        """Store the row's answer in its job; returns the job if that ended it."""
        job, index = running.owners.pop(row)
        job.device_time += row.device_time
        job.batch = max(job.batch, row.batch)
        if row.error is not None:
            self.drop(job)
            return job, named_row(as_ours(running.loaded.key, row.error), index, job)
        job.answers[index] = row.answer
        self._executor.observe(running.loaded, [row.item], [row.answer], rows=row.batch, seconds=row.run_time)
        return (job, None) if job.done else None

    def _stream_pieces(self, running: _Running, ended: Sequence[RunningRow]) -> None:
        pieces = []
        for row in (*running.batch.rows, *ended):
            job, _ = running.owners[row]
            at = row.generated.emitted
            if job.stream and (text := row.generated.new_text()):
                pieces.append((job.delivery.job, Piece(job.attempt, at, text)))
        if pieces:
            self._stream.put(pieces)

    def _counted(self, running: _Running) -> None:
        running.loaded.in_use = bool(running.owners)
        self.rows = sum(len(running.owners) for running in self._running.values())
