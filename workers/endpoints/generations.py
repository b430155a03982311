"""Generations of plain text that may be cut: their text is kept in the job's record, for the next run to go on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Collection, Sequence
from functools import partial

from broker.valkey.worker_store import WorkerStore, insist
from tasks.heartbeat import Yieldable
from tasks.models.model import ANSWER_BOUND, Profile
from taxiway.backoff import Outage
from taxiway.contract.job import GenerationPart
from taxiway.contract.stream import CutGeneration
from taxiway.errors import BrokerUnavailableError
from workers.device import Device
from workers.endpoints.http import EndpointLink
from workers.endpoints.places import EndpointUse, Seat
from workers.endpoints.protocol import AskItem, EndpointError, EngineRequest, Exchange
from workers.endpoints.variants import EndpointVariants
from workers.port import Row
from workers.stages.job import RunningJob, TextRun

logger = logging.getLogger(__name__)

KEEP_EVERY = 1.0
"""Seconds between two times that the texts of running preemptible jobs are kept."""

Kept = tuple[str, str, CutGeneration]
"""A job, the token of its claim, and what to keep of it."""


class Generations:
    """The plain texts that an endpoint generates now. For one event loop.

    Once `stopping` is set, what cannot be read is not waited for.
    """

    def __init__(self, store: WorkerStore, use: EndpointUse, stopping: threading.Event) -> None:
        self._store, self._use, self._stopping = store, use, stopping
        self._running: dict[RunningJob, tuple[Exchange, Seat]] = {}
        self._keep_at = 0.0
        self._keeping: asyncio.Task[None] | None = None

    async def recall(self, job: RunningJob) -> None:
        """Find what earlier runs of the job left, if its answer can be cut and go on.

        Raises:
            BrokerUnavailableError: the worker stops, and the store does not answer.
        """
        item = job.items[0]
        if job.delivery.sealed is not None or len(job.items) > 1 or not isinstance(item, AskItem) or not item.plain:
            return
        job.generation = TextRun(item.seed)
        if job.attempt > 1:
            read = partial(self._store.kept, job.delivery.job)
            outage = Outage(logger, "cannot read what was kept of a generation")
            job.generation.kept = await asyncio.to_thread(insist, read, self._stopping, outage)

    def yieldable(self, variants: EndpointVariants, now: float) -> tuple[Yieldable, ...]:
        """The preemptible ones that were not asked to yield. Thread-safe."""
        return tuple(
            self._described(job, exchange, seat, variants.curve(loaded), now)
            for job, (exchange, seat) in list(self._running.items())
            if job.ticket.preemptible
            and job.delivery.yields is None
            and self.can_yield(job)
            and (loaded := variants.ready(job.model, job.variant)) is not None
        )

    def _described(self, job: RunningJob, exchange: Exchange, seat: Seat, curve: Profile, now: float) -> Yieldable:
        """A running generation; its answer counts with all the tokens that it may have."""
        generation, item = job.generation, job.items[0]
        before = 0 if generation is None else generation.kept.tokens
        written = before if exchange.reader is None else exchange.reader.written
        rows, prompt = float(max(self._use.running, 1)), item.size - int(item.parameters[ANSWER_BOUND])
        read, left = prompt + written, max(int(item.parameters[ANSWER_BOUND]) - written, 0)
        redo, run = curve.latency(rows, read, read), now - seat.since
        rest = curve.latency(rows, read + left, read) - redo
        can_go_on = isinstance(item, AskItem) and item.go_on is not None
        cuts = 0 if generation is None else len(generation.kept.parts)
        return job.delivery.yieldable(run, rest, redo if can_go_on else redo + run, cuts=cuts)

    def can_yield(self, job: RunningJob) -> bool:
        """Whether the job's answer has no more than text so far, and can be cut."""
        exchange, _ = self._running.get(job, (None, None))
        reader = None if exchange is None else exchange.reader
        return job.generation is not None and not (reader is not None and reader.more)

    def begin(self, job: RunningJob, exchange: Exchange, seat: Seat) -> None:
        """The job's answer is asked for."""
        if job.generation is not None:
            self._running[job] = exchange, seat

    def end(self, job: RunningJob, device: Device, now: float) -> None:
        """The exchange has ended, in any way."""
        self._note(job, device, now)
        self._running.pop(job, None)

    def keep(self, device: Device) -> None:
        """Keep the texts of running preemptible jobs, if that is due."""
        now = time.monotonic()
        busy = self._keeping is not None and not self._keeping.done()
        jobs = [job for job in self._running if job.ticket.preemptible and not job.delivery.lost]
        if now < self._keep_at or busy or not jobs:
            return
        self._keep_at = now + KEEP_EVERY
        for job in jobs:
            self._note(job, device, now)
        self._keeping = asyncio.create_task(self._store_kept(cut(jobs, "its worker was lost")))

    async def kept(self) -> None:
        """Wait until nothing is being kept: what a job keeps at its end comes last."""
        if self._keeping is not None:
            await asyncio.wait([self._keeping])

    def _note(self, job: RunningJob, device: Device, now: float) -> None:
        """Note how far the job's answer is, and what this run of it used."""
        generation, running = job.generation, self._running.get(job)
        if generation is None or running is None:
            return
        exchange, seat = running
        reader, kept, name = exchange.reader, generation.kept, job.delivery.hardware_class
        if reader is not None and reader.more:  # more than text
            job.generation = None
            return
        generation.text, generation.tokens = (reader.text, reader.written) if reader else (kept.text, kept.tokens)
        generation.part = GenerationPart(
            hardware_class=name,
            variant=job.key,
            device=device.label,
            text=len(generation.text) - len(kept.text),
            tokens=exchange.tokens,
            seconds=now - seat.since,
            cost=sum(dollars(job, device, exchange, self._use.share(seat, now))),
            seam=generation.seam,
        )

    async def _store_kept(self, kept: Sequence[Kept]) -> None:
        with contextlib.suppress(BrokerUnavailableError):  # the heartbeat logs the outage
            await asyncio.to_thread(self._store.keep, kept)


async def request_of(job: RunningJob, item: AskItem, link: EndpointLink, timeout: float) -> EngineRequest | Row:
    """What to send: for the whole answer, or the rest of one that was cut; the answer, if nothing is left of it.

    An endpoint that cannot go on within `timeout` seconds begins again.
    """
    generation = job.generation
    if generation is None or not generation.kept.text:
        return item.ask
    if item.go_on is None:
        generation.restart("the endpoint cannot continue a text")
        return item.ask
    try:
        ask = await link.converse(item.go_on(generation.kept), timeout, base=link.root)
    except EndpointError as error:
        generation.restart(error.reason)
        return item.ask
    before = generation.kept.parts[-1].variant if generation.kept.parts else job.key
    generation.seam = "continued" if before == job.key else f"continued by {job.key} after {before}"  # it may differ
    return ask


def cut(jobs: Collection[RunningJob], reason: str) -> list[Kept]:
    """What to keep of those of these jobs that can go on, if they are cut now for this reason."""
    return [
        (job.delivery.job, job.delivery.token, job.generation.cut(job.attempt, reason))
        for job in jobs
        if job.generation is not None and job.delivery.token
    ]


def dollars(job: RunningJob, device: Device, exchange: Exchange, share: float) -> tuple[float, float]:
    """US dollars of a row for its tokens, and for its share of the endpoint's time in seconds."""
    ticket, name = job.ticket, job.delivery.hardware_class
    tariff = ticket.tariffs.get(name)
    used = exchange.cost if tariff is None else tariff.bill(exchange.tokens, 1)
    return used, device.prices.get(name, ticket.prices[name]) / 3600 * share
