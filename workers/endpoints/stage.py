"""Stage 3 of an endpoint's worker: runs as many rows on the endpoint at once as it has slots, on one event loop.

Each job is a task of its own. When its job is cancelled or expires, its connections are closed. A job that the endpoint
failed returns to its queue after a pause, and runs elsewhere or here again; one that never ran does not count as an
attempt. While the endpoint is out of service, or asked for a pause, nothing is fetched. A generation that ends early,
as it yields or its endpoint or worker goes, leaves its text to its next run (`generations`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace

from msgspec.structs import replace as replace_fields

from tasks.heartbeat import EndpointFacts, Yieldable
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model
from tasks.models.profiles import ProfileBook, ran_size
from tasks.queues.endpoints import Endpoint
from taxiway.contract.job import Tokens
from taxiway.contract.keys import LEVELS, PATIENT, learned_key
from taxiway.contract.stream import NOTHING, CutGeneration, Delta, Piece
from taxiway.errors import BrokerUnavailableError, DeviceFaultError, ExecutionError, TaxiwayError
from workers.decide.faults import RETRIES, describe
from workers.device import Device
from workers.endpoints.generations import Generations, cut, dollars, request_of
from workers.endpoints.peers import Origin, open_link
from workers.endpoints.places import EndpointHealth, EndpointPlace, EndpointPlaces, EndpointUse, is_full, pieces_of
from workers.endpoints.protocol import (
    AskItem,
    Behalf,
    EndpointError,
    EndpointProtocol,
    EngineRequest,
    Exchange,
    FaultKind,
    Tell,
    patient_slots,
)
from workers.endpoints.variants import EndpointVariants
from workers.learned import Loaded
from workers.port import Row
from workers.stages.admit import named_row, prepare
from workers.stages.job import Delivery, Ended, Ending, Returned, RunningJob, Used, late
from workers.stages.queues import AHEAD_FOR, DeviceDriver, DeviceQueue, Shared

logger = logging.getLogger(__name__)

SLOT_POLL = 0.05
"""Seconds between two looks for jobs that Celery's remote control revoked; cancellations arrive at once."""

ABSENT = 1.0
"""Seconds for which a job is kept from its queue whose model the endpoint does not list, or which it refused alone."""

SEEN = 0.75
"""Seconds after that in which nothing is fetched, so that a router sees it there and may move it."""

_IDLE_WAIT = 1.0  # seconds; any arrival ends the wait


class EndpointStage(DeviceDriver):
    """Runs the admitted jobs on one endpoint until each has an outcome.

    Args:
        key: the endpoint's API key; empty for none.
        origin: this fleet, as it is called at another one.

    Raises:
        EndpointConfigError: the endpoint's certificates cannot be read.
    """

    use: EndpointUse
    variants: EndpointVariants

    def __init__(
        self,
        endpoint: Endpoint,
        protocol: EndpointProtocol,
        key: str,
        variants: EndpointVariants,
        inbox: DeviceQueue,
        shared: Shared,
        origin: Origin,
    ) -> None:
        self.variants = variants
        self.ahead = 2 * AHEAD_FOR  # patient rows are looked for again as soon where `levels` leaves them out
        self._inbox = inbox
        self._shared = shared

        def place(endpoint: Endpoint, device: Device, announced: Callable[[EndpointHealth], None]) -> EndpointPlace:
            link = open_link(endpoint, device.address, key, shared.store.limits.stall, origin)
            return EndpointPlace(endpoint, EndpointHealth(link, protocol, endpoint, inbox.wake, announced))

        self._places = EndpointPlaces(endpoint, variants, place, inbox.wake)
        self.use = self._places.use
        self._tasks: dict[RunningJob, asyncio.Task[None]] = {}
        self._rows = 0
        self._turned, self._rest_until = math.inf, 0.0
        self._stopping = threading.Event()
        self._generations = Generations(shared.store, self.use, self._stopping)

    @property
    def fault(self) -> str:
        """Why the endpoint gets no work now; empty if it gets some. Thread-safe."""
        return self._places.gone or self._places.now.health.fault

    @property
    def resting(self) -> bool:
        """See `SEEN`. Thread-safe."""
        return time.monotonic() < self._rest_until

    @property
    def endpoint(self) -> EndpointFacts:
        """What is known of the endpoint. Thread-safe."""
        health, gate = self._places.now.health, self._places.now.gate
        facts = EndpointFacts(state=health.state, allowed=gate.allowed, engine=health.engine, pause=health.pause)
        if (peer := health.link.peer) is None:
            return replace_fields(facts, curves=self.variants.curves())
        return replace_fields(facts, peer=replace_fields(peer, offers=self.variants.offered(peer.offers)))

    @property
    def yieldable(self) -> tuple[Yieldable, ...]:
        """The running generations that can yield. Thread-safe."""
        return self._generations.yieldable(self.variants, time.monotonic())

    def memory(self) -> tuple[str, bytes]:
        """What was learned of the endpoint's times. Thread-safe."""
        return learned_key(self.variants.device.address), self.variants.memory()

    def warm_up(self, models: Sequence[Model]) -> None:
        """Recall what earlier processes learned, and probe once: the first heartbeat says whether it serves."""
        with contextlib.suppress(BrokerUnavailableError):
            self.variants.recall(self._shared.store.learned(learned_key(self.variants.device.address)))
        asyncio.run(self._places.now.health.probe_alone())

    def renew(self, catalogue: Catalogue, book: ProfileBook, *, warm: Sequence[Model]) -> None:
        """Switch to a new catalogue and profiles; running jobs end as they began. Thread-safe."""
        self.variants.renew(catalogue, book)

    def follow(self, endpoint: Endpoint) -> None:
        """Go by what queues.yaml says now; what runs ends where it began. Thread-safe."""
        self._places.follow(endpoint)

    def stop(self) -> None:
        """Run the jobs here that end in time, requeue the rest, and end. Thread-safe."""
        self._stopping.set()
        self._inbox.wake()

    def wait_for_capacity(self, longest: float) -> int:
        """Wait until slots are free, at most `longest` seconds; returns for how many jobs. Thread-safe."""
        longest = min(longest, self._places.now.gate.wait or longest)
        self._inbox.wait_for(lambda: self._capacity() > 0 or self._stopping.is_set(), longest)
        jobs = max(math.ceil(self._capacity() / self._inbox.rows_a_job), 0)
        patient = self._patient_left()
        return min(jobs, patient) if patient > 0 else jobs

    def levels(self) -> int:
        """As `DeviceDriver.levels`: patient jobs leave some slots of another fleet to urgent ones. Thread-safe."""
        return LEVELS if self._patient_left() > 0 else PATIENT

    def _patient_left(self) -> int:
        """How many more patient jobs may be held here."""
        place = self._places.now
        if not place.endpoint.is_peer:
            return sys.maxsize
        held = sum(delivery.ticket.level >= PATIENT for delivery in self._shared.held.all())
        return patient_slots(place.health.slots) - held

    def hung(self, now: float) -> bool:
        """Whether the event loop does not turn. Thread-safe."""
        return now - self._turned > self._shared.store.limits.stall

    def run(self) -> None:
        """Run until stopped, then finish what ends in time."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(news.set)

        self._inbox.notify(tell)
        await self._places.now.health.open()
        while not self._stopping.is_set():
            await self._turn(news)
        while self._tasks and self._shared.drain.left > 0:
            await self._turn(news)
        self._collect()
        await self._leave()
        self._inbox.notify(lambda: None)

    async def _turn(self, news: asyncio.Event) -> None:
        """Wait for news, and act on it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SLOT_POLL if self._tasks else _IDLE_WAIT):
                await news.wait()
        news.clear()
        self._turned = time.monotonic()
        self._collect()
        self._sweep()
        self._generations.keep(self.variants.device)
        self._places.turn()

    def _collect(self) -> None:
        """Begin the jobs that arrived."""
        for job in self._inbox.take(0.0, lambda: False):
            if not self._shared.may_run(job, self._now()):
                continue
            if not self.variants.is_current(job.model):
                self._shared.admissions.put(job.delivery)
                continue
            absent = job.key in self.variants.absent
            loaded = None if absent else self._prepared(job)
            if loaded is not None:
                self._begin_task(job, self._run(job, loaded), len(job.items))
            elif absent:
                self._begin_task(job, self._put_off(job), 1)

    def _begin_task(self, job: RunningJob, doing: Coroutine[None, None, None], rows: int) -> None:
        def forget(_: asyncio.Task[None]) -> None:
            del self._tasks[job]
            self._rows -= rows
            self._inbox.wake()

        self._rows += rows
        task = self._tasks[job] = asyncio.create_task(doing)
        task.add_done_callback(forget)

    def _sweep(self) -> None:
        """End the tasks of jobs that were revoked, whose claim was lost, or that are to yield."""
        for job, task in list(self._tasks.items()):
            if task.done():
                continue
            yields = job.delivery.yields is not None and self._generations.can_yield(job) and not job.delivery.ended
            if self._shared.may_run(job, -math.inf) and (not yields or task.cancelling()):
                continue
            task.cancel()

    async def _leave(self) -> None:
        """Requeue the jobs that did not end in time."""
        jobs = sorted(self._tasks, key=lambda job: job.arrived)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._places.close()
        if jobs:
            with contextlib.suppress(BrokerUnavailableError):
                self._shared.store.keep(cut(jobs, "its worker stopped"))
            self._shared.held.requeue([job.delivery for job in jobs])

    def _capacity(self) -> int:
        place, running = self._places.now, self.use.running
        slots = 0 if self._places.gone or self.resting else place.health.slots
        if is_full(place.health.engine):
            slots = min(slots, max(running, 1))
        waiting = self._rows - running + self._inbox.rows
        return int(min(slots - running, place.gate.free)) - waiting

    def _now(self) -> float:
        """The store's time."""
        return time.monotonic() + self._inbox.clock

    async def _put_off(self, job: RunningJob) -> None:
        """Return a job whose model the endpoint does not list: another class may run it, or a later list has it."""
        await self._keep_back()
        self._shared.endings.put([Returned(job.delivery, counts=False)])

    async def _keep_back(self) -> None:
        """Let others be fetched before a job returns to its queue, and none once it is there."""
        await asyncio.sleep(ABSENT)
        self._rest_until = time.monotonic() + SEEN

    def _prepared(self, job: RunningJob) -> Loaded | None:
        """The variant that the job runs on; None if that or the job's rows cannot be had, and the job was failed."""
        loaded = self.variants.ready(job.model, job.variant)
        try:
            if loaded is None:
                reason = self.variants.unavailable.get(job.key, "the endpoint does not run it")
                raise ExecutionError(f"{job.key} is unavailable on this device: {reason}", variant=job.key)
            if not job.items:
                prepare(job, loaded)
        except TaxiwayError as error:
            self._shared.endings.put([Ended(job.delivery, error=error)])
            return None
        return loaded

    async def _run(self, job: RunningJob, loaded: Loaded) -> None:
        """Run the job, and pass on how it ended; cancelled, it says nothing unless it yields."""
        try:
            with contextlib.suppress(BrokerUnavailableError):  # stopping
                await self._generations.recall(job)
            ending = await self._outcome(job, loaded)
        except asyncio.CancelledError:
            delivery = job.delivery
            if delivery.yields is None or delivery.lost or delivery.ended or self._stopping.is_set():
                raise
            ending = _returned(job, delivery.yields.reason, counts=False)
        if isinstance(ending, Returned):
            job.generation = None  # it cannot yield any more
            await self._generations.kept()
        self._shared.endings.put([ending])

    async def _outcome(self, job: RunningJob, loaded: Loaded) -> Ending:
        left = None if math.isinf(job.deadline) else job.deadline - self._now()
        try:
            async with asyncio.timeout(left):
                await self._answer(job, loaded)
        except TimeoutError:
            return late(job.delivery, self._now())
        except EndpointError as error:
            _forget(error)
            return await self._failed(job, error)
        except TaxiwayError as error:
            return Ended(job.delivery, error=error)
        except Exception as error:  # any failure ends only this job
            logger.exception("a job failed in the endpoint's worker", extra={"job": job.delivery.job})
            failed = ExecutionError(f"{job.key}: {describe(error)}", variant=job.key)
            return Ended(job.delivery, error=failed)
        return job

    async def _answer(self, job: RunningJob, loaded: Loaded) -> None:
        """Run every row of the job."""
        rows = [asyncio.ensure_future(self._answer_row(job, index, loaded)) for index in range(len(job.items))]
        try:
            await asyncio.gather(*rows)
        finally:
            for row in rows:
                row.cancel()

    async def _answer_row(self, job: RunningJob, index: int, loaded: Loaded) -> None:
        item = job.items[index]
        assert isinstance(item, AskItem)
        place = self._places.now
        async with place.slots:
            place.health.check()
            await _let_in(place, item.size, job)
            self._begin(job.delivery)
            ask = await request_of(job, item, place.health.link, place.endpoint.connect_timeout)
            if not isinstance(ask, EngineRequest):
                job.answers[index] = ask
                return
            ask = ask.with_priority(job.ticket.level) if place.endpoint.priority else ask
            prompt = ran_size(job.model, item.size, item.parameters, {}) + _kept_of(job).tokens
            behalf = self._behalf(job, index) if place.endpoint.is_peer else None
            exchange = Exchange(ask, prompt, behalf, item.size)
            seat = self.use.enter(time.monotonic())
            self._generations.begin(job, exchange, seat)
            try:
                answer = await self._asked(place.health, exchange, job, index)
            except TaxiwayError as error:
                raise named_row(error, index, job) from error
            except asyncio.CancelledError:
                exchange.aborted = exchange.ran
                raise
            finally:
                now = time.monotonic()
                self._generations.end(job, self.variants.device, now)
                seconds, share = self.use.leave(seat, now)
                place.gate.leave(exchange, item.size)
                self._bill(job, exchange, share, now)
        mates = seconds / max(share, 1e-9) if seconds > 0 else 1.0
        job.answers[index] = answer
        job.device_time += share
        self.use.learn(share)
        job.run_time = time.time() - job.delivery.began
        job.batch = max(job.batch, round(mates))
        self.variants.learn(loaded, item, exchange, rows=max(mates, 1.0), seconds=seconds)

    def _behalf(self, job: RunningJob, row: int) -> Behalf:
        delivery = job.delivery
        left = None if math.isinf(job.deadline) else max(job.deadline - self._now(), 1e-3)
        trace = delivery.headers.traceparent if delivery.headers is not None else None
        key = f"{delivery.job}#{job.attempt}.{row}"
        traced = trace if isinstance(trace, str) else ""
        return Behalf(key, left, delivery.body, job.stream, traced, delivery.sealed)

    def _bill(self, job: RunningJob, exchange: Exchange, share: float, now: float) -> None:
        """Note what a row used, however it ended; `share` is its part of the endpoint's time."""
        if not exchange.ran:
            return
        delivery, tokens = job.delivery, exchange.tokens
        used, time_dollars = dollars(job, self.variants.device, exchange, share)
        job.billed += used
        if tokens != Tokens():
            job.tokens = tokens if job.tokens is None else job.tokens.plus(tokens)
        first, each = pieces_of(exchange, now)
        if excess := exchange.reader.excess if exchange.reader is not None else 0:
            extra = {"job": delivery.job, "variant": job.key, "excess": excess}
            logger.warning("endpoint counts more tokens than the request may have; not billed", extra=extra)
        self._shared.endings.put([Used(delivery, tokens, used, time_dollars, first, each, exchange.aborted, excess)])

    async def _asked(self, health: EndpointHealth, exchange: Exchange, job: RunningJob, row: int) -> Row:
        tell = self._publisher(job, row, exchange) if job.stream else lambda parts: None
        try:
            answer = await health.link.ask(exchange, tell)
        except EndpointError as error:
            health.failed(error, job.delivery.job)
            raise
        except TaxiwayError:
            health.answered()
            raise
        health.answered()
        return answer

    def _begin(self, delivery: Delivery) -> None:
        if delivery.began:
            return
        delivery.began, delivery.started = time.time(), self._now()
        if delivery.task is not None and not delivery.retries:
            delivery.task.start()

    def _publisher(self, job: RunningJob, row: int, exchange: Exchange) -> Tell:
        """What passes on the generated answer to a row of a job that streams, after what was kept of it."""
        kept = _kept_of(job)
        at, sent = len(kept.text), 0
        if kept.text:
            self._shared.pieces.put([(job.delivery.job, Piece(job.attempt, 0, kept.text, row, tokens=kept.tokens))])

        def tell(parts: Sequence[str | Delta]) -> None:
            nonlocal at, sent
            pieces = []
            for part in parts:
                if isinstance(part, str):
                    pieces.append((job.delivery.job, Piece(job.attempt, at, part, row, sent)))
                    at += len(part)
                else:
                    pieces.append((job.delivery.job, Piece(job.attempt, at, "", row, sent, (part,))))
                    sent += 1
            written = 0 if exchange.reader is None else exchange.reader.written
            pieces[-1:] = [(name, replace(last, tokens=written)) for name, last in pieces[-1:]]
            self._shared.pieces.put(pieces)

        return tell

    async def _failed(self, job: RunningJob, error: EndpointError) -> Ending:
        """A job that the endpoint failed runs again after a pause, unless it has had all its attempts."""
        delivery = job.delivery
        logger.warning(
            "endpoint failed a job", extra={"job": delivery.job, "kind": str(error.kind), "error": error.reason}
        )
        if error.kind is FaultKind.REFUSED:
            await self._keep_back()
        if error.kind is not FaultKind.BROKEN:
            return _returned(job, error.reason, counts=False)
        began = 0 if delivery.claim is None else delivery.claim.attempts
        if began + 1 < delivery.ticket.attempts(self._shared.store.limits.attempts):
            await asyncio.sleep(RETRIES.pause(began + 1, random.random()))
            return _returned(job, error.reason, counts=True)
        failed = DeviceFaultError(f"{job.key}: {error.reason}", variant=job.key, retry_after=1.0)
        return Ended(delivery, error=failed)


async def _let_in(place: EndpointPlace, size: int, job: RunningJob) -> None:
    """Wait for the rate limits; a wait that is long is a pause of the endpoint."""
    try:
        await place.gate.enter(size)
    except EndpointError as error:
        place.health.failed(error, job.delivery.job)
        raise


def _forget(error: BaseException) -> None:
    """Free what a failed attempt has read, which its frames hold: the next attempt reads it again."""
    for one in (error, error.__cause__):
        if one is not None:
            traceback.clear_frames(one.__traceback__)


def _returned(job: RunningJob, reason: str, *, counts: bool) -> Returned:
    """The return of a job to its queue, with what is to be kept of its answer."""
    kept = next((kept for _, _, kept in cut([job], reason)), None)
    return Returned(job.delivery, counts=counts, kept=kept)


def _kept_of(job: RunningJob) -> CutGeneration:
    return NOTHING if job.generation is None else job.generation.kept
