"""Producers: submit jobs at all interfaces, wait for their results, and record what they observe."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from taxiway.contract.job import Result
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, ResultTimeoutError, TaxiwayError, UnknownJobError
from tests.chaos.history import Accepted, CancelRequested, Recorder, Refused, Submitted, Unanswered
from tests.chaos.interfaces import AcceptedJob, Interface
from tests.chaos.results import observed
from tests.chaos.workload import JobSpec

RETRY_FOR = 20.0
"""Seconds for which a producer retries a failed submit under the same key."""

_PAUSE = 0.3  # seconds before a retry


class Load:
    """Producers on a thread of their own, which calls `open_interfaces`."""

    def __init__(self, open_interfaces: Callable[[], Mapping[str, Interface]], recorder: Recorder) -> None:
        self._open, self._recorder = open_interfaces, recorder
        self._interfaces: Mapping[str, Interface] = {}
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.all_submitted = False

    @property
    def settled(self) -> bool:
        """Whether all jobs were submitted and every waiter was notified."""
        return self.all_submitted and not self.waiting

    @property
    def waiting(self) -> int:
        """How many jobs have no result yet."""
        return len(self._tasks)

    def start(self, specs: Sequence[JobSpec], seconds: float) -> None:
        """Begin to submit the jobs, evenly over so many seconds."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._submit_all(specs, seconds), self._loop)

    def submit(self, spec: JobSpec) -> None:
        """Submit one more job. Thread-safe."""
        self._loop.call_soon_threadsafe(self._begin, spec)

    def stop(self) -> None:
        """Stop waiting for jobs that have no result."""
        asyncio.run_coroutine_threadsafe(self._give_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _submit_all(self, specs: Sequence[JobSpec], seconds: float) -> None:
        self._interfaces = self._open()
        began = time.monotonic()
        for place, spec in enumerate(specs):
            await asyncio.sleep(max(0.0, began + place * seconds / len(specs) - time.monotonic()))
            self._begin(spec)
        self.all_submitted = True

    def _begin(self, spec: JobSpec) -> None:
        task = self._loop.create_task(self._produce(spec))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _give_up(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for interface in self._interfaces.values():
            await interface.close()

    async def _produce(self, spec: JobSpec) -> None:
        self._recorder.record(Submitted(number=spec.number, model=spec.model, deadline=spec.deadline, key=spec.key))
        if spec.twice:
            await asyncio.gather(
                self._submit_and_wait(spec, spec.interfaces), self._submit_and_wait(spec, spec.interfaces[::-1])
            )
        else:
            await self._submit_and_wait(spec, spec.interfaces)

    async def _submit_and_wait(self, spec: JobSpec, interfaces: Sequence[str]) -> None:
        """Submit the job, cancel it if specified, and wait for its end."""
        accepted = await self._submit(spec, interfaces)
        if accepted is None:
            return
        job, interface = accepted
        if spec.cancel:
            self._recorder.record(CancelRequested(job=job.id))
            with suppress(TaxiwayError):
                await job.cancel()
        await self._record_end(job, interface)

    async def _submit(self, spec: JobSpec, interfaces: Sequence[str]) -> tuple[AcceptedJob, str] | None:
        """The job and the interface that accepted it, None if refused. A job with a key is retried at the next."""
        until = time.monotonic() + (RETRY_FOR if spec.key else 0.0)
        attempt = 0
        while True:
            name, began = interfaces[attempt % len(interfaces)], time.time()
            try:
                job = await self._interfaces[name].submit(spec)
            except FleetUnavailable as error:
                if time.monotonic() >= until:
                    unclear = isinstance(error, BrokerUnavailableError)
                    self._recorder.record(Refused(number=spec.number, error=error.code, unclear=unclear))
                    return None
                attempt += 1
                await asyncio.sleep(_PAUSE)
            except TaxiwayError as error:
                self._recorder.record(Refused(number=spec.number, error=error.code))
                return None
            else:
                replicated = self._interfaces[name].replicated
                accepted = Accepted(number=spec.number, job=job.id, interface=name, began=began, replicated=replicated)
                self._recorder.record(accepted)
                return job, name

    async def _record_end(self, job: AcceptedJob, interface: str) -> None:
        """Record how the job ended; retried while the fleet is unavailable or the job is unknown."""
        end: Result | TaxiwayError | None = None
        last_error = ""
        try:
            while end is None:
                try:
                    end = await job.result(60.0)
                except (BrokerUnavailableError, ResultTimeoutError, UnknownJobError) as error:
                    last_error = error.message
                    await asyncio.sleep(_PAUSE)
                except TaxiwayError as error:
                    end = error
        except asyncio.CancelledError:
            self._recorder.record(Unanswered(job=job.id, interface=interface, error=last_error))
            raise
        self._recorder.record(observed(job.id, interface, end))
