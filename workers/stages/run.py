"""Runs batches on the device, and says what it computes: whole, or row by row in the process of a Python callable."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from workers.decide.occupation import BATCHES, Occupation, blocking_by_model
from workers.executor import Answer, Executor, WatchedItem, run_rows, time_limit
from workers.learned import Loaded
from workers.port import Interruptible, RowWatch
from workers.stages.job import RunningJob
from workers.stages.lane import Portions, RowRate
from workers.stages.runs import Runs


class BatchUse:
    """What the device computes now, and has computed. Any thread may read it; only who has its turn changes it.

    Args:
        wanted: whether a job's rows may continue.
        longest: seconds for which the class's batches run at most.
    """

    def __init__(self, wanted: Callable[[RunningJob], bool], longest: float) -> None:
        self._wanted = wanted
        self._longest = longest
        self.running = 0
        self.busy = 0.0  # seconds of finished batches
        self.must_end_by = math.inf
        self.rate = RowRate()
        self._since: float | None = None
        self._beside = 0.0  # seconds of batches that ran beside a row in its own process
        self._whole: tuple[Occupation, Portions] | None = None
        self._batches: deque[tuple[float, str, float]] = deque(maxlen=BATCHES)

    def computed(self, now: float) -> float:
        """Seconds that the device has computed, including the running batch."""
        return self.busy + self.batch_age(now)

    def batch_age(self, now: float) -> float:
        """Seconds for which the running batch has run, 0 if there is none."""
        since = self._since
        return max(now - since, 0.0) if since is not None else 0.0

    def occupied(self, now: float) -> float:
        """Device seconds that the running batch will still spend on rows of ended jobs."""
        whole = self._whole
        if whole is None:
            return 0.0
        occupation, batch = whole
        unwanted = sum(len(rows) for job, rows in batch if not self._wanted(job))
        return occupation.left(now, unwanted / sum(len(rows) for _, rows in batch))

    def blocked(self, now: float) -> tuple[float, int]:
        """Seconds until a long, uninterruptible batch ends, and its most urgent level; 0 if there is none."""
        whole = self._whole
        if whole is None or not whole[0].longer_than(self._longest, now):
            return 0.0, 0
        levels = [job.ticket.level for job, _ in whole[1] if self._wanted(job)]
        return (whole[0].ends_in(now), min(levels)) if levels else (0.0, 0)  # ended jobs count in `occupied`

    def blocking(self, now: float) -> dict[str, float]:
        """Seconds that a job of each model may wait for a batch of another."""
        return blocking_by_model(reversed(tuple(self._batches)), now)

    @contextmanager
    def batch(self, rows: int) -> Iterator[Callable[[], float]]:
        """A batch runs within; then the call gives its seconds, without those of batches that ran beside it."""
        started, beside, seconds = time.monotonic(), self._beside, 0.0
        self._since, self.running = started, rows
        yield lambda: seconds
        seconds = time.monotonic() - started - (self._beside - beside)
        self.running, self.must_end_by = 0, math.inf
        self.busy, self._since = self.busy + seconds, None
        self.rate.count(rows, started + seconds)

    @contextmanager
    def whole(self, model: str, batch: Portions, predicted: float) -> Iterator[None]:
        """The batch cannot be interrupted within."""
        now = time.monotonic()
        self._whole = Occupation(now, predicted), batch
        try:
            yield
        finally:
            self._whole = None
            self._batches.append((now, model, time.monotonic() - now))

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Other batches run within, while a row goes on in its own process."""
        started, outer = time.monotonic(), (self.running, self.must_end_by, self._since)
        yield
        seconds = time.monotonic() - started
        self._beside += seconds
        self.running, self.must_end_by, self._since = outer[0], outer[1] + seconds, outer[2]


class DeviceRunner:
    """Runs batches on the executor.

    Args:
        stall: seconds beyond its time limit after which a batch counts as hung.
        wanted: whether a job's rows may continue.
        serve_beside: runs due batches that are more urgent than the job, while its row runs in its own process.
        runs: begins the runs of callables that have a `Run`.
    """

    def __init__(
        self,
        executor: Executor,
        use: BatchUse,
        stall: float,
        wanted: Callable[[RunningJob], bool],
        serve_beside: Callable[[RunningJob], None],
        runs: Runs,
    ) -> None:
        self._executor = executor
        self._use = use
        self._stall = stall
        self._wanted = wanted
        self._serve_beside = serve_beside
        self._runs = runs
        self._fault: Exception | None = None
        self.calling = False  # a row runs in its own process: no model changes

    def run(self, loaded: Loaded, batch: Portions) -> Sequence[Answer]:
        """The answers to the rows of a batch; None for a row that was interrupted."""
        if loaded.interruptible is not None:
            return self._run_rows(loaded, loaded.interruptible, batch)
        items = [job.items[row] for job, rows in batch for row in rows]
        self._use.must_end_by = time.monotonic() + self._stall + time_limit(loaded, items)
        with self._use.whole(loaded.model.id, batch, self._executor.predicted(loaded, items)):
            return self._executor.run(loaded, items)

    def _run_rows(self, loaded: Loaded, runtime: Interruptible, batch: Portions) -> Sequence[Answer]:
        """Run the batch row by row, each while it is wanted."""
        rows = [WatchedItem(job.items[row], self._watch(loaded, job, row)) for job, rows in batch for row in rows]
        self._use.must_end_by = time.monotonic() + sum(row.watch.seconds for row in rows) + self._stall
        self.calling = loaded.in_use = True  # a load beside it must evict other variants
        answers = run_rows(self._executor, loaded, runtime, rows)
        self.calling = loaded.in_use = False
        if self._fault is not None:  # from a batch that ran beside it: a fault of this process, not of the row
            raise self._fault
        return answers

    def _watch(self, loaded: Loaded, job: RunningJob, row: int) -> RowWatch:
        longest, named = loaded.variant.limits.time, "limits.time in its model.yaml"
        if longest is None:
            longest, named = self._stall + time_limit(loaded, [job.items[row]]), "limits.stall in queues.yaml, and more"
        run = partial(self._runs.run, job, row, self._executor.predicted(loaded, [job.items[row]]))
        return RowWatch(job.delivery.job, partial(self._goes_on, job), longest, named, run)

    def _goes_on(self, job: RunningJob) -> bool:
        """Whether the job's running row may continue; runs more urgent batches first."""
        try:
            if not job.delivery.suspect:  # else it runs alone
                with self._use.beside():
                    self._serve_beside(job)
        except Exception as error:  # raised here, it would count as the row's error
            self._fault = error
        job.yielded = job.yielded or job.outstays
        return self._fault is None and not job.yielded and self._wanted(job)
