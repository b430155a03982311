"""What a router reads and writes in the state store, by topic: the fleet, jobs, holding, receipts, refusals."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf
from typing import Any

import msgspec

from broker.port import KEPT_DEAD, DeadLetter, StoredReceipts
from broker.valkey import Call
from broker.valkey.forwarding import (
    Drawn,
    RefusedJob,
    Survey,
    draw_answer,
    draw_call,
    forget_call,
    list_refused_call,
    survey_answer,
    survey_call,
)
from broker.valkey.jobs import (
    Ending,
    Overdue,
    YieldAnswer,
    YieldAsk,
    finish_call,
    forget_ended_call,
    overdue_answer,
    overdue_call,
    yield_call,
)
from broker.valkey.processes import watch_answer, watch_call
from router.decide.facts import FleetFacts, figures, named
from router.decide.fairness import day_of
from router.decide.plan import PLAN_AT_MOST
from router.service.append_only_file import AppendOnlyFile
from router.service.celery_message import After
from router.service.decision import StoredRefusal
from tasks.history import SLICE, UnservedTerms, slice_of, unserved_text
from tasks.models.folder import Watched
from tasks.queues.limits import Limits
from tasks.queues.receipts import Chain, PlacementReceipt
from taxiway.connection import AsyncConnection
from taxiway.contract import keys
from taxiway.contract.job import JobState, accepted_meta, failure_meta
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError, JobCancelledError
from taxiway.valkey import Command

PLAN_EVERY = 1.0
"""Seconds between two readings of the plan."""

UNWRITTEN = 10_000
"""Receipts that wait for a state store that does not answer; beyond that the oldest are dropped, which leaves a gap."""

_SERVER = "state store"
_KEPT = 600  # seconds: they are renewed every `housekeeping.PUBLISH`
_FORGOTTEN = 500  # groups of jobs in the index checked per call: about 1 ms of the server's time


class StoreClock:
    """The store's time, by this host's clock since the store was asked."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._turn: float | None = None  # the time returned in this iteration of the event loop

    def set(self, now: float, asked: float) -> None:
        """The store's time was `now` halfway between `asked`, by this host's clock, and this moment."""
        self._ahead = now - (asked + time.monotonic()) / 2

    def now(self) -> float:
        """The store's time."""
        return time.monotonic() + self._ahead

    def stored_now(self) -> float:
        """The store's time for values that are stored: it fails before the store has been asked.

        Constant within one iteration of the event loop, so that requests that arrive together get equal records.

        Raises:
            BrokerUnavailableError: the store's time is not known yet.
        """
        if not self._ahead:
            raise BrokerUnavailableError(f"the time of the {_SERVER} is not known yet", retry_after=1.0)
        if self._turn is None:
            self._turn = self.now()
            asyncio.get_running_loop().call_soon(setattr, self, "_turn", None)
        return self._turn


class FleetStore:
    """What the fleet reports, and what routers publish of it."""

    def __init__(self, calls: AsyncConnection, periodic: AsyncConnection, clock: StoreClock) -> None:
        self._calls, self._periodic = calls, periodic
        self._clock = clock
        self._file = AppendOnlyFile(periodic)
        self._plan, self._plan_read_at = b"", -inf

    async def facts(self, bounded: Sequence[str] = ()) -> FleetFacts:
        """All facts that the fleet reports, and of tenants whose depth is `bounded`, in one round trip."""
        day, asked = day_of(self._clock.now()), time.monotonic()
        plan_due = asked - self._plan_read_at >= PLAN_EVERY
        answers = await self._periodic.calls(
            ("TIME",),
            ("HGETALL", keys.DEVICES),
            ("ZRANGE", keys.HEARTBEATS, 0, -1, "WITHSCORES"),
            ("HGETALL", keys.WORK),
            ("HGETALL", keys.LENGTHS),
            ("HGETALL", keys.STARTS),
            ("EXISTS", keys.DRAINING),
            ("HGETALL", keys.spent_key(day)),
            ("INFO", "server", "memory", "persistence", "errorstats"),
            *(("ZCOUNT", keys.open_key(tenant), self._clock.now(), "+inf") for tenant in bounded),
            *([("GETRANGE", keys.PLAN, 0, PLAN_AT_MOST)] if plan_due else []),
        )
        time_of, devices, heartbeats, work, lengths, starts, draining, spent, info, *rest = answers
        now = int(time_of[0]) + int(time_of[1]) / 1e6
        self._clock.set(now, asked)
        depths, plan = rest[: len(bounded)], rest[len(bounded) :]
        if plan:
            self._plan, self._plan_read_at = bytes(plan[0]), time.monotonic()
        values = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
        await self._file.observe(values)
        if day_of(now) != day:  # at the first read, or at midnight
            spent = await self._periodic.call("HGETALL", keys.spent_key(day_of(now)))
        return FleetFacts(
            now=now,
            devices=named(devices),
            heartbeats=figures(heartbeats),
            work=figures(work),
            lengths=named(lengths),
            starts=figures(starts),
            draining=bool(draining),
            spent=figures(spent),
            used=_used(values),
            refuses=self._file.refuses,
            plan=self._plan,
            open=dict(zip(bounded, map(float, depths), strict=True)),
        )

    async def depths(self, tenants: Collection[str]) -> tuple[dict[str, float], dict[str, float]]:
        """The cells of `WORK`, and the unfinished jobs of these tenants as far as their depth is bounded."""
        opened = (("ZCOUNT", keys.open_key(tenant), self._clock.now(), "+inf") for tenant in tenants)
        work, *depths = await self._calls.calls(("HGETALL", keys.WORK), *opened)
        return figures(work), dict(zip(tenants, map(float, depths), strict=True))

    async def publish(self, models: bytes, queues: bytes) -> None:
        """Publish what the fleet can run, for clients of the broker, and its queues.yaml, for machines that join.

        Both are JSON, and expire unless renewed.
        """
        await self._calls.calls(("SET", keys.MODELS, models, "EX", _KEPT), ("SET", keys.QUEUES, queues, "EX", _KEPT))

    async def waiting(self, classes: Sequence[str]) -> tuple[dict[str, int], int]:
        """The messages in each class's queue, and the number of held jobs."""
        lists = [keys.priority_lists(name) for name in classes]
        held, *lengths = await self._periodic.calls(
            ("HLEN", keys.HELD), *(("LLEN", one) for names in lists for one in names)
        )
        each = iter(lengths)
        return {name: sum(next(each) for _ in names) for name, names in zip(classes, lists, strict=True)}, held

    async def add_sample(self, sample: bytes, most: int) -> None:
        """Add a sample to the timeline; the oldest beyond `most` are dropped."""
        await self._periodic.transaction(("LPUSH", keys.TIMELINE, sample), ("LTRIM", keys.TIMELINE, 0, most - 1))

    async def forget_devices(self, workers: Sequence[str]) -> None:
        """Delete devices that have been gone for long."""
        await self._calls.transaction(("HDEL", keys.DEVICES, *workers), ("ZREM", keys.HEARTBEATS, *workers))

    async def watch(self, arguments: Sequence[str | bytes]) -> Watched:
        """Report what this router serves; returns what operators asked for."""
        return watch_answer(await self._calls.run(watch_call(arguments)))


class JobStore:
    """Jobs' ends, and what becomes of those that are not placed. `ended` counts the jobs ended here, by final state."""

    def __init__(self, calls: AsyncConnection, periodic: AsyncConnection, limits: Limits) -> None:
        self.ended: Counter[tuple[str, ...]] = Counter()
        self._calls, self._periodic = calls, periodic
        self._limits = limits
        self._forgotten = self._ended_before = "-inf"

    async def accepted_before(self, uses: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each job was accepted, for a request with this digest."""
        found: Any = await self._calls.calls(*(("HMGET", keys.job_key(job), "state", "digest") for job, _ in uses))
        return [
            bool(state) and (first or b"") == digest.encode()
            for (state, first), (_, digest) in zip(found, uses, strict=True)
        ]

    async def finish(self, endings: Sequence[Ending]) -> list[bool]:
        """End jobs; True for each that had not ended before."""
        written = await self._finish(endings)
        self.ended.update((str(ending.state),) for ending, done in zip(endings, written, strict=True) if done)
        return written

    async def finish_all(self, groups: Sequence[tuple[Ending, After]]) -> list[tuple[str, Envelope]]:
        """End jobs, and then the tasks that were to follow each of them, unless that job had ended before.

        Returns the calls of their error links, which are now to be sent, with their queues.
        """
        written = await self.finish([ending for ending, _ in groups])
        left = [after for (_, after), done in zip(groups, written, strict=True) if done]
        if endings := [one for after in left for one in after.endings]:
            await self._finish(endings)
        return [call for after in left for call in after.calls]

    async def cancel(self, jobs: Sequence[str]) -> list[bool]:
        """End jobs as cancelled; True for each that had not ended before."""
        error = JobCancelledError("cancelled on request")
        return await self.finish([Ending(job, JobState.CANCELLED, failure_meta(job, error)) for job in jobs])

    async def ask_to_yield(self, asks: Sequence[YieldAsk]) -> list[YieldAnswer]:
        """Ask the holders of running jobs to yield them; what became of each ask, in order."""
        return [YieldAnswer(one) for one in await self._calls.run(yield_call(self._limits.yield_within, asks))]

    async def refuse(self, refusals: Sequence[StoredRefusal]) -> None:
        """Publish refusals to their submitters, independent of the jobs that have their idempotency keys.

        A copy of a request that was accepted before is confirmed instead: its key's job is the submitter's job.
        """
        keyed = [one for one in refusals if one.digest]
        known = await self.accepted_before([(one.job, one.digest) for one in keyed])
        copies = {one.submission for one, before in zip(keyed, known, strict=True) if before}
        commands: list[Command] = []
        for one in refusals:
            meta = accepted_meta(one.submission, one.job) if one.submission in copies else one.meta
            commands.append(("SET", keys.result_key(one.submission), meta, "EX", self._limits.keep_result))
            if one.reply:
                commands.append(("PUBLISH", keys.reply_channel(one.reply), meta))
        await self._calls.calls(*commands)

    async def note_refused(self, jobs: Mapping[str, RefusedJob]) -> None:
        """Record what jobs that ended before placement were, list them, and announce that, unless they are listed."""
        await self._calls.run(list_refused_call(jobs, self._limits.keep_record))

    async def overdue(self, most: int, lease: float) -> tuple[int, list[Overdue], float]:
        """The number of groups of jobs due, up to `most`; the jobs in them that have not ended; the next due time.

        Jobs not ended within `lease` seconds are returned again.
        """
        return overdue_answer(await self._periodic.run(overdue_call(most, lease)))

    async def forget_listed(self) -> None:
        """Check some of the oldest jobs in the index, and remove those whose records are gone.

        Entries that remain are checked again after all others.
        """
        self._forgotten = await self._swept(forget_call(self._forgotten, self._limits.keep_record, _FORGOTTEN))

    async def forget_ended(self) -> None:
        """Check some of the jobs that have a deadline, and remove those that have ended; as `forget_listed` does."""
        self._ended_before = await self._swept(forget_ended_call(self._ended_before, _FORGOTTEN))

    async def dead_letter(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Store messages that cannot be answered as dead letters; the oldest beyond a limit are dropped."""
        push = ("LPUSH", keys.DEAD, *(msgspec.json.encode(dead_letter) for dead_letter in dead_letters))
        await self._calls.transaction(push, ("LTRIM", keys.DEAD, 0, KEPT_DEAD - 1))

    async def drop_blobs(self, job: str, refs: Iterable[str]) -> None:
        """Delete the blobs of a request that did not become this job, except those that the job's record refers to."""
        own: Any = await self._calls.call("HGET", keys.job_key(job), "blobs")
        dropped = {keys.blob_key(ref) for ref in refs} - set((own or b"").decode().split())
        if dropped:
            await self._calls.call("UNLINK", *dropped)

    async def _finish(self, endings: Sequence[Ending]) -> list[bool]:
        call = finish_call(endings, keep_result=self._limits.keep_result, keep_record=self._limits.keep_record)
        return [bool(one) for one in await self._calls.run(call)]

    async def _swept(self, call: Call) -> str:
        """Where the next sweep begins, after one of up to `_FORGOTTEN` groups."""
        looked, last = await self._periodic.run(call)
        return f"({last.decode()}" if looked == _FORGOTTEN else "-inf"


class HoldingStore:
    """Jobs that are held."""

    def __init__(self, calls: AsyncConnection, periodic: AsyncConnection) -> None:
        self._calls, self._periodic = calls, periodic

    async def survey(self) -> Survey:
        """The holding queues that have jobs."""
        return survey_answer(await self._periodic.run(survey_call()))

    async def draw(self, token: str, queue: str, most: int, lease: float) -> tuple[float, list[Drawn]]:
        """The store's time and a holding queue's first jobs, for the leader; jobs not placed within `lease` return."""
        return draw_answer(await self._calls.run(draw_call(token, queue, most, lease)))

    async def give_back(self, jobs: Sequence[str]) -> None:
        """Return drawn jobs to holding, from the next survey on."""
        await self._calls.call("ZADD", keys.RELEASED, "XX", *(part for job in jobs for part in (0, keys.job_key(job))))

    async def messages(self, jobs: Sequence[str], most: int) -> dict[str, bytes]:
        """The messages of those of these jobs that are held, by job, without any of more than `most` bytes."""
        sizes: Any = await self._calls.calls(*(("HSTRLEN", keys.HELD, keys.job_key(job)) for job in jobs))
        short = [job for job, size in zip(jobs, sizes, strict=True) if 0 < size <= most]
        found: Any = await self._calls.call("HMGET", keys.HELD, *map(keys.job_key, short)) if short else ()
        return {job: raw for job, raw in zip(short, found, strict=True) if raw is not None}


class AuditLog:
    """One router's receipts. Each is kept here until the state store has it, so that an outage leaves no gap."""

    def __init__(self, calls: AsyncConnection, chain: Chain, most: int) -> None:
        self._calls, self._chain, self._most = calls, chain, most
        self._unwritten: dict[bytes, None] = {}

    def add(self, receipts: Iterable[PlacementReceipt]) -> None:
        """Sign receipts, to be written with the next ones, or by the next `write`."""
        for receipt in receipts:
            self._unwritten[self._chain.seal(receipt)] = None
        while len(self._unwritten) > UNWRITTEN:
            del self._unwritten[next(iter(self._unwritten))]

    def sealed(self, receipts: Iterable[PlacementReceipt]) -> StoredReceipts | None:
        """What is to be written together with the jobs of these receipts; None if there is nothing."""
        self.add(receipts)
        return StoredReceipts(list(self._unwritten), self._most) if self._unwritten else None

    def written(self, lines: Sequence[bytes]) -> None:
        """The state store has these lines."""
        for line in lines:
            self._unwritten.pop(line, None)

    async def write(self, receipts: Iterable[PlacementReceipt] = ()) -> None:
        """Write receipts that no job is written with, and those that wait. Raises `BrokerUnavailableError`."""
        if waiting := self.sealed(receipts):
            bound = ("MAXLEN", "~", waiting.most)
            await self._calls.calls(*(("XADD", keys.RECEIPTS, *bound, "*", "line", line) for line in waiting.lines))
            self.written(waiting.lines)


class UnservedDemand:
    """What one router refused for lack of hardware since it started, `total`, and what it still has to write of that.

    Refusals of a second count with the terms of the last of them that has the same model, tenant, service and labels,
    so that a flood of unlike requests takes little of the state store. What cannot be written is lost.
    """

    def __init__(self, calls: AsyncConnection, keep: int) -> None:
        self.total = 0
        self._calls, self._keep = calls, keep
        self._counted: dict[tuple[int | str, ...], tuple[UnservedTerms, int]] = {}

    def add(self, now: float, asked: UnservedTerms) -> None:
        """Count a refusal at `now` seconds of the store's clock."""
        kind = (slice_of(now), asked.model, asked.tenant, asked.terms.service, asked.terms.locality)
        self._counted[kind] = asked, self._counted.get(kind, (asked, 0))[1] + 1
        self.total += 1

    async def write(self) -> None:
        """Add the counts to those of all routers. Raises `BrokerUnavailableError`."""
        counted, self._counted = self._counted, {}
        begins = {int(begin) for begin, *_ in counted}
        counts = [
            ("HINCRBY", keys.unserved_key(str(begin)), unserved_text(asked), times)
            for (begin, *_), (asked, times) in counted.items()
        ]
        if counts:
            until = (("EXPIREAT", keys.unserved_key(str(begin)), begin + SLICE + self._keep) for begin in begins)
            await self._calls.calls(*counts, *until)


class RouterStore:
    """The state store, by topic. Every call raises `BrokerUnavailableError` while it does not answer."""

    def __init__(self, url: str, limits: Limits, chain: Chain | None = None) -> None:
        """`chain`: that of the router's receipts."""
        self.calls, self._periodic = AsyncConnection(url, server=_SERVER), AsyncConnection(url, server=_SERVER)
        self.clock = StoreClock()
        self.fleet = FleetStore(self.calls, self._periodic, self.clock)
        self.jobs = JobStore(self.calls, self._periodic, limits)
        self.holding = HoldingStore(self.calls, self._periodic)
        self.unserved = UnservedDemand(self.calls, limits.keep_record)
        self.audit = AuditLog(self.calls, chain or Chain(), limits.receipts)

    async def close(self) -> None:
        """Disconnect."""
        self.calls.close()
        self._periodic.close()


def _used(values: Mapping[str, str]) -> float:
    """The share of its memory limit that a server uses; 0 if it has no limit."""
    most = float(values["maxmemory"])
    return float(values["used_memory"]) / most if most else 0.0
