"""What the HTTP API reads and writes in the state store: jobs and their values for callers, the fleet for operators.

Every call raises `BrokerUnavailableError` while the store does not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Any

import msgspec

from broker.valkey.jobs import revive_call
from router.decide.facts import figures, named
from router.decide.plan import LatestTuning
from router.service.store import StoreClock
from tasks.models.folder import LIVE, ProcessReport
from taxiway.connection import AsyncConnection
from taxiway.contract import keys
from taxiway.contract.job import result_in
from taxiway.contract.limits import Buffer
from taxiway.contract.peers import WaitingLine
from taxiway.contract.stream import Piece, StreamEntry, read_entries
from taxiway.contract.values import BLOB_KEPT
from taxiway.valkey import Command, stored

LINE_KEPT_EVERY = 3
"""Seconds after which a connection that waits for work is to be kept again."""

_SERVER = "state store"
_PIECES = 256  # read at once
_PIECES_WAIT = 500  # milliseconds: less than the server's answer timeout
_READERS = 4096  # streams followed at once, each on its own connection; further ones wait
_CARRIERS = 4  # connections for blobs, used in rotation


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
        contents = await asyncio.gather(*(next(self._carriers).call("GET", keys.blob_key(ref)) for ref in refs))
        return dict(zip(refs, contents, strict=True))

    async def keep(self, kept: Mapping[str, Buffer]) -> None:
        """Store the blobs of a request that is about to be forwarded."""
        writes = (stored(keys.blob_key(ref), content, BLOB_KEPT) for ref, content in kept.items())
        await asyncio.gather(*(next(self._carriers).calls(*commands) for commands in writes))

    async def pieces(self, job: str, after: str) -> list[tuple[str, StreamEntry]]:
        """What a job's stream has after an entry, with its entry ids; waits a moment for something."""
        command = ("XREAD", "COUNT", _PIECES, "BLOCK", _PIECES_WAIT, "STREAMS", keys.stream_key(job), after)
        async with self._reader() as reader:
            streams: Any = await reader.call(*command)
        return read_entries(streams[0][1] if streams else [])

    async def first_piece(self, job: str) -> float | None:
        """When the first piece of a job's answer was streamed; None if none was, or it is no longer there."""
        entries: Any = await self._calls.call("XRANGE", keys.stream_key(job), "-", "+", "COUNT", 1)
        for entry, piece in read_entries(entries):
            if isinstance(piece, Piece) and not (piece.at or piece.sent):
                return int(entry.partition("-")[0]) / 1000
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

    async def keep_line(self, peer: str, line: WaitingLine) -> None:
        """Have workers find a connection that waits for work, for a while."""
        await self._calls.call("SET", keys.line_key(peer), msgspec.json.encode(line), "EX", 2 * LINE_KEPT_EVERY)

    async def calls(self, *commands: Command) -> list[Any]:
        """The answers to commands with long answers, beside the calls that others wait for."""
        return await next(self._carriers).calls(*commands)

    def close(self) -> None:
        """Disconnect."""
        for connection in (*self._lines, *self._readers):
            connection.close()


class StoredJobs:
    """Jobs' records and results."""

    def __init__(self, calls: AsyncConnection) -> None:
        self._calls = calls

    async def results(self, jobs: Sequence[str]) -> list[bytes | None]:
        """The stored result of each job; None if there is none, or it has expired."""
        return [result_in(raw) for raw in await self._calls.call("MGET", *map(keys.result_key, jobs))]

    async def without_record(self, jobs: Sequence[str]) -> set[str]:
        """Those of these jobs that have no record."""
        if await self._calls.call("EXISTS", *map(keys.job_key, jobs)) == len(jobs):
            return set()
        return {job for job in jobs if not await self._calls.call("EXISTS", keys.job_key(job))}

    async def record_and_result(self, job: str) -> tuple[dict[str, str], bytes | None]:
        """Both, read atomically."""
        fields, meta = await self._calls.transaction(("HGETALL", keys.job_key(job)), ("GET", keys.result_key(job)))
        return {name: value.decode() for name, value in named(fields).items()}, result_in(meta)

    async def snapshot(self, name: str) -> bytes | None:
        """A stored fleet snapshot; None if it has expired."""
        packed: Any = await self._calls.call("GET", keys.snapshot_key(name))
        return packed if packed is None else bytes(packed)

    async def first_digest(self, job: str) -> str:
        """The digest of the request that first used a job's idempotency key; empty if unknown."""
        digest: Any = await self._calls.call("HGET", keys.job_key(job), "digest")
        return (digest or b"").decode()

    async def placed_at(self, hardware_class: str, level: int) -> tuple[list[float], int]:
        """A class's unfinished jobs by level, up to this one, and the count of jobs ever placed at this level."""
        cells = [keys.work_cell(hardware_class, one) for one in range(level + 1)]
        figures: Any = await self._calls.call(
            "HMGET", keys.WORK, *map(keys.jobs_cell, cells), keys.turns_cell(cells[-1])
        )
        *jobs, turns = (float(figure or 0) for figure in figures)
        return jobs, int(turns)

    async def before(self, job: str, queue: str) -> int | None:
        """The number of jobs released before this one from its holding queue; None if it is not held."""
        rank: Any = await self._calls.call("ZRANK", keys.holding_key(queue), keys.job_key(job))
        return rank if rank is None else int(rank)


class OperatorStore:
    """What processes and the tuner report, what operators ask of all processes, and dead letters."""

    def __init__(self, calls: AsyncConnection, clock: StoreClock) -> None:
        self._calls = calls
        self.clock = clock

    async def tuner(self) -> tuple[str, LatestTuning | None]:
        """The token of the tuner at work, empty if there is none, and what the last tuning found."""
        token, latest = await self._calls.calls(("GET", keys.TUNER), ("GET", keys.TUNING))
        return (token or b"").decode(), None if latest is None else msgspec.json.decode(latest, type=LatestTuning)

    async def samples(self) -> list[bytes]:
        """The samples in the timeline, latest first."""
        return list(await self._calls.call("LRANGE", keys.TIMELINE, 0, -1))

    async def note_start(self, hardware_class: str) -> None:
        """Record that devices of the class are started on demand."""
        await self._calls.call("HSET", keys.STARTS, hardware_class, repr(self.clock.now()))

    async def drain(self) -> None:
        """Have routers hand work to other fleets, until `resume`."""
        await self._calls.call("SET", keys.DRAINING, repr(self.clock.now()))

    async def resume(self) -> None:
        """End that."""
        await self._calls.call("DEL", keys.DRAINING)

    async def catalogues(self) -> dict[str, ProcessReport]:
        """What each running process serves, by its name."""
        now, seen, raw = await self._calls.transaction(
            ("TIME",), ("ZRANGE", keys.CATALOGUES_SEEN, 0, -1, "WITHSCORES"), ("HGETALL", keys.CATALOGUES)
        )
        reports = named(raw)
        live = [name for name, at in figures(seen).items() if int(now[0]) - at <= LIVE and name in reports]
        return {name: msgspec.json.decode(reports[name], type=ProcessReport) for name in live}

    async def failing(self) -> dict[str, str]:
        """The processes that supervisors say have failed, each with how."""
        (raw,) = await self._calls.transaction(("HGETALL", keys.FAILING))
        found: dict[str, str] = {}
        for processes in named(raw).values():
            found |= msgspec.json.decode(processes, type=dict[str, str])
        return dict(sorted(found.items()))

    async def held_and_dead(self) -> tuple[int, int]:
        """The number of held jobs and of dead letters."""
        held, dead = await self._calls.calls(("HLEN", keys.HELD), ("LLEN", keys.DEAD))
        return int(held), int(dead)

    async def dead_letters(self, start: int, most: int) -> list[bytes]:
        """Dead letters as stored, latest first, from index `start`."""
        return list(await self._calls.call("LRANGE", keys.DEAD, start, start + most - 1))

    async def drop_dead_letter(self, raw: bytes) -> None:
        """Delete a dead letter."""
        await self._calls.call("LREM", keys.DEAD, 1, raw)

    async def revive(self, job: str) -> bool:
        """Clear a job's dead-lettered end; False if it did not end that way."""
        return bool(await self._calls.run(revive_call(job)))
