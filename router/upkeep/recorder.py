"""Keeps the history of arrivals: what was requested in each 10 seconds, and what became of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from broker.valkey import Call
from router.decide.basis import terms_of
from router.decide.facts import named
from router.service.store import RouterStore
from router.upkeep.leader import Duty
from tasks.history import (
    ENDED,
    JOB,
    SETTLE,
    SLICE,
    Arrivals,
    ServiceLatency,
    again_at,
    fresh_slices,
    hour_of,
    indices,
    joined,
    latencies,
    pack,
    surplus_hours,
    unpack,
    unserved,
)
from tasks.models.profiles import tokens_of
from tasks.queues.limits import Limits
from taxiway.connection import AsyncConnection
from taxiway.contract.job import JobState
from taxiway.contract.keys import ACCEPTED, HISTORY, HISTORY_OPEN, RECORDED, history_key, unserved_key
from taxiway.running import beside

logger = logging.getLogger(__name__)

GROUPS = 256
"""Groups of jobs read per call."""

JOBS = 512
"""Jobs after which a call reads no further group: about 1 ms of the server's time."""

_CATCH_UP = 3600.0  # seconds that a new leader observes at least, even where records are kept for less
_SLICES_A_TICK = 4  # slices of each kind observed in one tick
_OUTCOME = np.dtype([("state", "u1"), ("hardware_class", "u1"), ("seconds", "<f4"), ("ran", "<f4")])
"""Of one job: its state and class by number, and seconds, as `jobs/history` packs them."""


class Recorder(Duty):
    """Observes each slice of arrivals once it is over, and again while some of its jobs have not ended.

    Its progress is in the state store, so that the next leader continues from there. `noted` is called with how long
    the jobs of each slice took.
    """

    def __init__(
        self, url: str, store: RouterStore, limits: Limits, noted: Callable[[Sequence[ServiceLatency]], None]
    ) -> None:
        super().__init__(SETTLE)
        self._connection = AsyncConnection(url, server="state store")
        self._store = store
        self._limits = limits
        self._noted = noted

    async def tick(self) -> None:
        """Observe the slices that are due, and delete the oldest hours beyond the limits."""
        now = self._store.clock.stored_now()
        until, again = await self._connection.transaction(
            ("HGET", HISTORY, RECORDED), ("ZRANGEBYSCORE", HISTORY_OPEN, "-inf", now, "LIMIT", 0, _SLICES_A_TICK)
        )
        known = None if until is None else float(until)
        fresh = fresh_slices(known, now, longest=max(self._limits.keep_record, _CATCH_UP), most=_SLICES_A_TICK)
        if known is None:
            await self._connection.transaction(("HSET", HISTORY, RECORDED, now))
        for begin in fresh:
            await self._record(begin, now)
        for begin in map(int, again):
            await self._renew(begin, now)
        if fresh:
            await self._trim(now)
        if _SLICES_A_TICK in (len(fresh), len(again)):
            self.wake()

    async def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    async def _record(self, begin: int, now: float) -> None:
        await self._write(begin, await self._observe(begin), now, before=0)
        await self._connection.transaction(("HSET", HISTORY, RECORDED, begin + SLICE))

    async def _renew(self, begin: int, now: float) -> None:
        """Observe a slice again, unless it was deleted, or some of its records have expired since."""
        (packed,) = await self._connection.transaction(("HGET", history_key(hour_of(begin)), begin))
        stored = None if packed is None else await beside(len(packed), unpack, begin, bytes(packed))
        arrivals = await self._observe(begin)
        if stored is None or len(arrivals) < len(stored):
            await self._connection.transaction(("ZREM", HISTORY_OPEN, begin))
        else:
            await self._write(begin, arrivals, now, before=len(packed))

    async def _observe(self, begin: int) -> Arrivals:
        parts, skip = list[Arrivals](), 0
        while True:
            span = [begin, begin + SLICE, skip, GROUPS, JOBS, *JobState]
            looked, *found = await self._connection.run(Call("jobs/history", [ACCEPTED], span))
            if not looked:
                (refused,) = await self._connection.transaction(("HGETALL", unserved_key(str(begin))))
                parts.append(unserved(begin, {terms: int(count) for terms, count in named(refused).items()}))
                return await beside(JOB.itemsize * sum(len(part) for part in parts), joined, parts)
            parts.append(arrivals_of(*found))
            skip += looked

    async def _write(self, begin: int, arrivals: Arrivals, now: float, *, before: int) -> None:
        packed = await beside(JOB.itemsize * len(arrivals), pack, begin, arrivals)
        hour, at = hour_of(begin), again_at(begin, arrivals, now)
        await self._connection.transaction(
            ("HSET", history_key(hour), begin, packed),
            ("EXPIREAT", history_key(hour), int(begin) + self._limits.keep_history + 3600),
            ("HINCRBY", HISTORY, hour, len(packed) - before),
            ("ZREM", HISTORY_OPEN, begin) if at is None else ("ZADD", HISTORY_OPEN, at, begin),
        )
        self._noted(await beside(JOB.itemsize * len(arrivals), latencies, begin, arrivals))

    async def _trim(self, now: float) -> None:
        (flat,) = await self._connection.transaction(("HGETALL", HISTORY))
        hours = {hour: int(size) for hour, size in named(flat).items() if hour != RECORDED}
        deleted = surplus_hours(hours, now, keep=self._limits.keep_history, most=self._limits.history)
        if deleted:
            await self._connection.transaction(("UNLINK", *map(history_key, deleted)), ("HDEL", HISTORY, *deleted))
            logger.debug("history deleted", extra={"hours": len(deleted), "oldest": deleted[0]})


def arrivals_of(classes: Sequence[bytes], groups: Sequence[Any], packed: bytes, generated: Sequence[Any]) -> Arrivals:
    """The columns of what was read from the records of placed jobs: the parts of the answer of `jobs/history`."""
    accepted, due, counts, models, tenants, bases = (groups[n::6] for n in range(6))
    every = [terms_of(basis.decode()) for basis in bases]
    kept = [n for n, one in enumerate(every) if one.rows > 0]
    terms = [every[n] for n in kept]
    texts = {
        "model": [models[n].decode() for n in kept],
        "tenant": [tenants[n].decode() for n in kept],
        "service": [one.service for one in terms],
        "locality": [one.locality for one in terms],
    }
    names = {column: tuple(dict.fromkeys(values)) for column, values in texts.items()}
    each: dict[str, Sequence[float]] = {
        "arrival": [float(accepted[n]) for n in kept],
        "deadline": [float(due[n]) - float(accepted[n]) if float(due[n]) else math.nan for n in kept],
        **{name: [getattr(one, name) for one in terms] for name in ("rows", "size", "expected", "priority")},
        **{column: indices(values, names[column]) for column, values in texts.items()},
    }
    outcomes, repeats = np.frombuffer(packed, _OUTCOME), np.array(counts, int)
    placed = np.repeat(np.isin(np.arange(len(counts)), kept), repeats)
    jobs = np.zeros(len(outcomes), JOB)
    for column, values in each.items():
        jobs[column][placed] = np.repeat(np.array(values), repeats[kept])
    jobs["output"] = -1
    for place, bins in zip(generated[::2], generated[1::2], strict=True):
        jobs["output"][place] = _mean(bins)
    jobs["state"], jobs["hardware_class"] = outcomes["state"], outcomes["hardware_class"]
    for column in ("seconds", "ran"):
        jobs[column] = np.where((jobs["state"] >= ENDED) & (outcomes[column] >= 0), outcomes[column], math.nan)
    return Arrivals(names | {"hardware_class": ("", *(name.decode() for name in classes))}, jobs[placed])


def _mean(bins: bytes) -> int:
    """The mean length of answers in these bins, in tokens."""
    places = msgspec.json.decode(bins, type=list[int])
    return round(sum(map(tokens_of, places)) / max(len(places), 1))
