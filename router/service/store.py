"""What a router reads and writes in the state store, by topic: the fleet, jobs, large values, holding, dead letters."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import cycle
from math import inf
from typing import Any

import msgspec

from broker.port import DeadLetter
from broker.valkey import Call
from broker.valkey.claims import YieldAnswer, YieldAsk, yield_call
from broker.valkey.deadlines import Overdue, forget_ended_call, overdue_answer, overdue_call
from broker.valkey.endings import Ending, finish_call, revive_call
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
from broker.valkey.presence import watch_answer, watch_call
from router.decide.facts import FleetFacts, figures, named
from router.decide.fairness import day_of
from router.decide.plan import PLAN_AT_MOST, LatestTuning
from router.service.append_only_file import AppendOnlyFile
from router.service.celery_message import After
from router.service.decision import StoredRefusal
from tasks.models.folder import LIVE, CatalogueReport, Watched
from tasks.queues.limits import Limits
from taxiway.connection import AsyncConnection
from taxiway.contract.job import JobState, accepted_meta, failure_meta
from taxiway.contract.keys import (
    CATALOGUES,
    CATALOGUES_SEEN,
    CONTROLS,
    DEAD,
    DEVICES,
    FAILING,
    HEARTBEATS,
    HELD,
    LENGTHS,
    MODELS,
    PLAN,
    RELEASED,
    RELOADS,
    STARTS,
    TIMELINE,
    TUNER,
    TUNING,
    WORK,
    blob_key,
    holding_key,
    job_key,
    jobs_cell,
    open_key,
    priority_lists,
    reply_channel,
    result_key,
    snapshot_key,
    spent_key,
    stream_key,
    turns_cell,
    work_cell,
)
from taxiway.contract.limits import Buffer
from taxiway.contract.listing import Ask, JobFilter, JobPage, list_jobs
from taxiway.contract.progress import result_in
from taxiway.contract.stream import Piece, StreamEntry, read_piece
from taxiway.contract.values import BLOB_KEPT
from taxiway.contract.wire import Envelope
from taxiway.errors import BrokerUnavailableError, JobCancelledError
from taxiway.valkey import Command

PLAN_EVERY = 1.0
"""Seconds between two readings of the plan."""


_SERVER = "state store"
_DEAD_AT_MOST = 10_000
_MODELS_KEPT = 600  # seconds: they are renewed every `housekeeping.PUBLISH`
_PIECES = 256  # read at once
_READERS = 4096  # streams followed at once, each on its own connection; further ones wait
_CARRIERS = 4  # connections for blobs, used in rotation
_FORGOTTEN = 500  # groups of jobs in the index checked per call: about 1 ms of the server's time
_PIECES_WAIT = 500  # milliseconds: less than the server's answer timeout


class StoreClock:
    """The store's time, by this host's clock since the store was asked."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._turn: float | None = None  # the time returned in this iteration of the event loop

    def set(self, now: float) -> None:
        """The store's time is `now`."""
        self._ahead = now - time.monotonic()

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
            asyncio.get_running_loop().call_soon(self._end_turn)
        return self._turn

    def _end_turn(self) -> None:
        self._turn = None


class FleetStore:
    """What devices, processes and the tuner report, and what operators ask of all processes."""

    def __init__(self, calls: AsyncConnection, periodic: AsyncConnection, clock: StoreClock) -> None:
        self._calls, self._periodic = calls, periodic
        self._clock = clock
        self._file = AppendOnlyFile(periodic)
        self._plan, self._plan_read_at = b"", -inf

    async def facts(self, bounded: Sequence[str] = ()) -> FleetFacts:
        """All facts that the fleet reports, and of tenants whose depth is `bounded`, in one round trip."""
        day = day_of(self._clock.now())
        plan_due = time.monotonic() - self._plan_read_at >= PLAN_EVERY
        answers = await self._periodic.calls(
            ("TIME",),
            ("HGETALL", DEVICES),
            ("ZRANGE", HEARTBEATS, 0, -1, "WITHSCORES"),
            ("HGETALL", WORK),
            ("HGETALL", LENGTHS),
            ("HGETALL", STARTS),
            ("HGETALL", spent_key(day)),
            ("INFO", "server", "memory", "persistence", "errorstats"),
            *(("ZCOUNT", open_key(tenant), self._clock.now(), "+inf") for tenant in bounded),
            *([("GETRANGE", PLAN, 0, PLAN_AT_MOST)] if plan_due else []),
        )
        time_of, devices, heartbeats, work, lengths, starts, spent, info, *rest = answers
        depths, plan = rest[: len(bounded)], rest[len(bounded) :]
        if plan:
            self._plan, self._plan_read_at = bytes(plan[0]), time.monotonic()
        values = _info_values(info)
        await self._file.observe(values)
        now = int(time_of[0]) + int(time_of[1]) / 1e6
        self._clock.set(now)
        if day_of(now) != day:  # at the first read, or at midnight
            spent = await self._periodic.call("HGETALL", spent_key(day_of(now)))
        return FleetFacts(
            now=now,
            devices=named(devices),
            heartbeats=figures(heartbeats),
            work=figures(work),
            lengths=named(lengths),
            starts=figures(starts),
            spent=figures(spent),
            used=_used(values),
            refuses=self._file.refuses,
            plan=self._plan,
            open=dict(zip(bounded, map(float, depths), strict=True)),
        )

    async def publish_models(self, listed: bytes) -> None:
        """Publish to clients of the broker what the fleet can run, as JSON; it expires unless renewed."""
        await self._calls.call("SET", MODELS, listed, "EX", _MODELS_KEPT)

    async def tuner(self) -> tuple[str, LatestTuning | None]:
        """The token of the tuner at work, empty if there is none, and what the last tuning found."""
        token, latest = await self._calls.calls(("GET", TUNER), ("GET", TUNING))
        return (token or b"").decode(), None if latest is None else msgspec.json.decode(latest, type=LatestTuning)

    async def waiting(self, classes: Sequence[str]) -> tuple[dict[str, int], int]:
        """The messages in each class's queue, and the number of held jobs."""
        lists = [priority_lists(name) for name in classes]
        held, *lengths = await self._periodic.calls(
            ("HLEN", HELD), *(("LLEN", one) for names in lists for one in names)
        )
        each = iter(lengths)
        return {name: sum(next(each) for _ in names) for name, names in zip(classes, lists, strict=True)}, held

    async def add_sample(self, sample: bytes, most: int) -> None:
        """Add a sample to the timeline; the oldest beyond `most` are dropped."""
        await self._periodic.transaction(("LPUSH", TIMELINE, sample), ("LTRIM", TIMELINE, 0, most - 1))

    async def samples(self) -> list[bytes]:
        """The samples in the timeline, latest first."""
        return list(await self._calls.call("LRANGE", TIMELINE, 0, -1))

    async def forget_devices(self, workers: Sequence[str]) -> None:
        """Delete devices that have been gone for long."""
        await self._calls.transaction(("HDEL", DEVICES, *workers), ("ZREM", HEARTBEATS, *workers))

    async def note_start(self, hardware_class: str) -> None:
        """Record that devices of the class are started on demand."""
        await self._calls.call("HSET", STARTS, hardware_class, repr(self._clock.now()))

    async def watch(self, arguments: Sequence[str | bytes]) -> Watched:
        """Report what this router serves; returns what operators asked for."""
        return watch_answer(await self._calls.run(watch_call(arguments)))

    async def ask_reload(self) -> int:
        """Ask all processes to reload their models folder; returns the number of such requests, this one included."""
        return int(await self._calls.call("INCR", RELOADS))

    async def control_models(self, marks: Mapping[str, str | None]) -> int:
        """Record what an operator asks of models, as `CONTROLS` has it, None for nothing; have all processes reload.

        Returns the number of that request.
        """
        kept = [part for name, mark in marks.items() if mark is not None for part in (name, mark)]
        dropped = [name for name, mark in marks.items() if mark is None]
        commands = [("HSET", CONTROLS, *kept)] if kept else []
        commands += [("HDEL", CONTROLS, *dropped)] if dropped else []
        return int((await self._calls.transaction(*commands, ("INCR", RELOADS)))[-1])

    async def catalogues(self) -> dict[str, CatalogueReport]:
        """What each running process serves, by its name."""
        now, seen, raw = await self._calls.transaction(
            ("TIME",), ("ZRANGE", CATALOGUES_SEEN, 0, -1, "WITHSCORES"), ("HGETALL", CATALOGUES)
        )
        reports = named(raw)
        live = [name for name, at in figures(seen).items() if int(now[0]) - at <= LIVE and name in reports]
        return {name: msgspec.json.decode(reports[name], type=CatalogueReport) for name in live}

    async def failing(self) -> dict[str, str]:
        """The processes that supervisors say have failed, each with how."""
        (raw,) = await self._calls.transaction(("HGETALL", FAILING))
        found: dict[str, str] = {}
        for processes in named(raw).values():
            found |= msgspec.json.decode(processes, type=dict[str, str])
        return dict(sorted(found.items()))


class ValueStore:
    """Values too large for messages, and generated answers as they grow, on connections of their own."""

    def __init__(self, url: str, calls: AsyncConnection) -> None:
        self._url = url
        self._calls = calls
        self._lines = [AsyncConnection(url, server=_SERVER) for _ in range(_CARRIERS)]
        self._carriers = cycle(self._lines)
        self._readers: list[AsyncConnection] = []  # idle
        self._reading = asyncio.Semaphore(_READERS)

    async def blobs(self, refs: Sequence[str]) -> dict[str, Buffer | None]:
        """The bytes of each blob; None if it has expired."""
        contents = await asyncio.gather(*(next(self._carriers).call("GET", blob_key(ref)) for ref in refs))
        return dict(zip(refs, contents, strict=True))

    async def keep(self, kept: Mapping[str, Buffer]) -> None:
        """Store the blobs of a request that is about to be forwarded."""
        sets = (("SET", blob_key(ref), content, "EX", BLOB_KEPT) for ref, content in kept.items())
        await asyncio.gather(*(next(self._carriers).call(*one) for one in sets))

    async def drop(self, job: str, refs: Iterable[str]) -> None:
        """Delete the blobs of a request that did not become this job, except those that the job's record refers to."""
        own: Any = await self._calls.call("HGET", job_key(job), "blobs")
        dropped = {blob_key(ref) for ref in refs} - set((own or b"").decode().split())
        if dropped:
            await self._calls.call("UNLINK", *dropped)

    async def pieces(self, job: str, after: str) -> list[tuple[str, StreamEntry]]:
        """What a job's stream has after an entry, with its entry ids; waits a moment for something."""
        command = ("XREAD", "COUNT", _PIECES, "BLOCK", _PIECES_WAIT, "STREAMS", stream_key(job), after)
        async with self._reader() as reader:
            streams: Any = await reader.call(*command)
        entries = streams[0][1] if streams else []
        return [(entry.decode(), read_piece(dict(zip(flat[::2], flat[1::2], strict=True)))) for entry, flat in entries]

    async def first_piece(self, job: str) -> float | None:
        """When the first piece of a job's answer was streamed; None if none was, or it is no longer there."""
        entries: Any = await self._calls.call("XRANGE", stream_key(job), "-", "+", "COUNT", 1)
        for entry, flat in entries:
            piece = read_piece(dict(zip(flat[::2], flat[1::2], strict=True)))
            if isinstance(piece, Piece) and not (piece.at or piece.sent):
                return int(entry.partition(b"-")[0]) / 1000
        return None

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[AsyncConnection]:
        """A connection for a command that blocks."""
        async with self._reading:
            reader = self._readers.pop() if self._readers else AsyncConnection(self._url, server=_SERVER)
            try:
                yield reader
            except BaseException:
                reader.close()
                raise
            self._readers.append(reader)

    async def ask(self, commands: Sequence[Sequence[str | int]]) -> list[Any]:
        """The answers to commands, beside the calls that others wait for."""
        return await next(self._carriers).calls(*commands)

    def close(self) -> None:
        """Disconnect."""
        for connection in (*self._lines, *self._readers):
            connection.close()


class JobStore:
    """Jobs' records, results and endings. `ended` counts the jobs ended here, by final state.

    `ask` sends commands with long answers.
    """

    def __init__(self, calls: AsyncConnection, periodic: AsyncConnection, limits: Limits, ask: Ask) -> None:
        self.ended: Counter[tuple[str, ...]] = Counter()
        self._calls, self._periodic = calls, periodic
        self._limits = limits
        self._ask = ask
        self._forgotten = self._ended_before = "-inf"

    async def record(self, job: str) -> dict[str, str]:
        """The fields of a job's record; empty if there is none."""
        return _texts(await self._calls.call("HGETALL", job_key(job)))

    async def result(self, job: str) -> bytes | None:
        """The stored result; None if there is none, or it has expired."""
        return result_in(await self._calls.call("GET", result_key(job)))

    async def results(self, jobs: Sequence[str]) -> list[bytes | None]:
        """The stored result of each job; None if there is none, or it has expired."""
        return [result_in(raw) for raw in await self._calls.call("MGET", *map(result_key, jobs))]

    async def without_record(self, jobs: Sequence[str]) -> set[str]:
        """Those of these jobs that have no record."""
        if await self._calls.call("EXISTS", *map(job_key, jobs)) == len(jobs):
            return set()
        return {job for job in jobs if not await self._calls.call("EXISTS", job_key(job))}

    async def record_and_result(self, job: str) -> tuple[dict[str, str], bytes | None]:
        """Both, read atomically."""
        fields, meta = await self._calls.transaction(("HGETALL", job_key(job)), ("GET", result_key(job)))
        return _texts(fields), result_in(meta)

    async def snapshot(self, name: str) -> bytes | None:
        """A stored fleet snapshot; None if it has expired."""
        packed: Any = await self._calls.call("GET", snapshot_key(name))
        return packed if packed is None else bytes(packed)

    async def first_digest(self, job: str) -> str:
        """The digest of the request that first used a job's idempotency key; empty if unknown."""
        digest: Any = await self._calls.call("HGET", job_key(job), "digest")
        return (digest or b"").decode()

    async def accepted_before(self, uses: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each job was accepted, for a request with this digest."""
        found: Any = await self._calls.calls(*(("HMGET", job_key(job), "state", "digest") for job, _ in uses))
        return [
            bool(state) and (first or b"") == digest.encode()
            for (state, first), (_, digest) in zip(found, uses, strict=True)
        ]

    async def placed_at(self, hardware_class: str, level: int) -> tuple[list[float], int]:
        """A class's unfinished jobs by level, up to this one, and the count of jobs ever placed at this level."""
        cells = [work_cell(hardware_class, one) for one in range(level + 1)]
        figures: Any = await self._calls.call("HMGET", WORK, *map(jobs_cell, cells), turns_cell(cells[-1]))
        *jobs, turns = (float(figure or 0) for figure in figures)
        return jobs, int(turns)

    async def list_jobs(self, wanted: JobFilter, *, limit: int, cursor: str) -> JobPage:
        """A page of the jobs that match `wanted`, latest first. Raises `InvalidRequestError` as `list_jobs` does."""
        return await list_jobs(self._ask, wanted, limit=limit, cursor=cursor)

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
        return await self.finish([_cancelled(job) for job in jobs])

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
            commands.append(("SET", result_key(one.submission), meta, "EX", self._limits.keep_result))
            if one.reply:
                commands.append(("PUBLISH", reply_channel(one.reply), meta))
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
        await self._calls.call("ZADD", RELEASED, "XX", *(part for job in jobs for part in (0, job_key(job))))

    async def before(self, job: str, queue: str) -> int | None:
        """The number of jobs released before this one from its holding queue; None if it is not held."""
        rank: Any = await self._calls.call("ZRANK", holding_key(queue), job_key(job))
        return rank if rank is None else int(rank)

    async def messages(self, jobs: Sequence[str], most: int) -> dict[str, bytes]:
        """The messages of those of these jobs that are held, by job, without any of more than `most` bytes."""
        sizes: Any = await self._calls.calls(*(("HSTRLEN", HELD, job_key(job)) for job in jobs))
        short = [job for job, size in zip(jobs, sizes, strict=True) if 0 < size <= most]
        found: Any = await self._calls.call("HMGET", HELD, *map(job_key, short)) if short else ()
        return {job: raw for job, raw in zip(short, found, strict=True) if raw is not None}

    async def held_and_dead(self) -> tuple[int, int]:
        """The number of held jobs and of dead letters."""
        held, dead = await self._calls.calls(("HLEN", HELD), ("LLEN", DEAD))
        return int(held), int(dead)


class DeadLetterStore:
    """Dead letters, and the jobs that ended so."""

    def __init__(self, calls: AsyncConnection) -> None:
        self._calls = calls

    async def add(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Store messages that cannot be answered as dead letters; the oldest beyond a limit are dropped."""
        push = ("LPUSH", DEAD, *(msgspec.json.encode(letter) for letter in dead_letters))
        await self._calls.transaction(push, ("LTRIM", DEAD, 0, _DEAD_AT_MOST - 1))

    async def page(self, start: int, most: int) -> list[bytes]:
        """Dead letters as stored, latest first, from index `start`."""
        return list(await self._calls.call("LRANGE", DEAD, start, start + most - 1))

    async def drop(self, raw: bytes) -> None:
        """Delete a dead letter."""
        await self._calls.call("LREM", DEAD, 1, raw)

    async def revive(self, job: str) -> bool:
        """Clear a job's dead-lettered end; False if it did not end that way."""
        return bool(await self._calls.run(revive_call(job)))


class RouterStore:
    """The state store, by topic. Every call raises `BrokerUnavailableError` while it does not answer."""

    def __init__(self, url: str, limits: Limits) -> None:
        self._calls, self._periodic = AsyncConnection(url, server=_SERVER), AsyncConnection(url, server=_SERVER)
        self.clock = StoreClock()
        self.fleet = FleetStore(self._calls, self._periodic, self.clock)
        self.values = ValueStore(url, self._calls)
        self.jobs = JobStore(self._calls, self._periodic, limits, self.values.ask)
        self.holding = HoldingStore(self._calls, self._periodic)
        self.dead_letters = DeadLetterStore(self._calls)

    async def close(self) -> None:
        """Disconnect."""
        self.values.close()
        self._calls.close()
        self._periodic.close()


def _cancelled(job: str) -> Ending:
    return Ending(job, JobState.CANCELLED, failure_meta(job, JobCancelledError("cancelled on request")))


def _texts(pairs: Sequence[bytes]) -> dict[str, str]:
    return {name: value.decode() for name, value in named(pairs).items()}


def _info_values(info: bytes) -> dict[str, str]:
    """The values in an answer to `INFO`, by name."""
    return dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)


def _used(values: Mapping[str, str]) -> float:
    """The share of its memory limit that a server uses; 0 if it has no limit."""
    most = float(values["maxmemory"])
    return float(values["used_memory"]) / most if most else 0.0
