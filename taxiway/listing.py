"""Lists a fleet's jobs page by page, most recent first, from the state store's job index and records."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from taxiway.contract.job import JobRecord, JobState, record_from
from taxiway.contract.keys import ACCEPTED, job_key
from taxiway.errors import wrong_field

if TYPE_CHECKING:
    from taxiway.valkey import Calls

LISTED_JOBS = 1000
"""Most jobs of a page."""

USUAL = 100
"""Jobs of a page by default."""

LOOKED = 10_000
"""Records read for one page: with a selective filter a page may end before it is full, and has a `next`."""

_GROUPS = 64  # groups of jobs per read
_FIELDS = tuple(name for name in JobRecord.__struct_fields__ if name != "id")
_STATES = frozenset(JobState)
_CURSOR = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,20})?)-([0-9]{1,9})")


class JobFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs to list: by `states`, model (`name` or `name:version`) and tenant; empty matches any."""

    states: frozenset[JobState] = frozenset()
    model: str = ""
    tenant: str = ""

    def passes(self, record: JobRecord) -> bool:
        """Whether a job matches."""
        return (
            (not self.states or record.state in self.states)
            and (not self.tenant or record.tenant == self.tenant)
            and (not self.model or self.model in (record.model, record.model.partition(":")[0]))
        )


class JobPage(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs, most recently accepted first; `next` is the cursor of the next page, None if there is none."""

    jobs: tuple[JobRecord, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """A position in the index: after the first few of the jobs accepted at score `at`."""

    at: float = math.inf
    behind: int = 0

    @property
    def cursor(self) -> str:
        return f"{self.at!r}-{self.behind}"


def states_of(names: Iterable[str]) -> frozenset[JobState]:
    """The states of these names.

    Raises:
        InvalidRequestError: a name is invalid; names `state`.
    """
    found = set()
    for name in names:
        if name not in _STATES:
            raise wrong_field("state", f"one of {', '.join(map(str, JobState))}", name)
        found.add(JobState(name))
    return frozenset(found)


async def list_jobs(calls: Calls, wanted: JobFilter, *, limit: int = USUAL, cursor: str = "") -> JobPage:
    """A page of the jobs that match `wanted`, from `cursor` on. Jobs that no router has seen yet are not listed.

    Raises:
        InvalidRequestError: `limit` or `cursor` is invalid.
    """
    if not 0 < limit <= LISTED_JOBS:
        raise wrong_field("limit", f"1 to {LISTED_JOBS}", limit)
    place, looked = _place_at(cursor), 0
    found: list[JobRecord] = []
    while looked < LOOKED:
        ahead = await _ahead(calls, place)
        if not ahead:
            return JobPage(jobs=tuple(found))
        records = await calls(*(("HMGET", key, *_FIELDS) for key, _ in ahead))
        for (key, here), values in zip(ahead, records, strict=True):
            place, record = here, _record(key, values)
            if record is not None and record.accepted == place.at and wanted.passes(record):
                found.append(record)
            if len(found) == limit:
                return JobPage(jobs=tuple(found), next=place.cursor)
        looked += len(ahead)
    return JobPage(jobs=tuple(found), next=place.cursor)


async def _ahead(calls: Calls, place: _Place) -> list[tuple[str, _Place]]:
    """The keys of the next jobs, each with the position after it; empty at the end."""
    most = _GROUPS
    while True:
        command = ("ZREVRANGEBYSCORE", ACCEPTED, repr(place.at), "-inf", "WITHSCORES", "LIMIT", 0, most)
        ((*flat,),) = await calls(command)
        ahead = _places(flat, place)
        if ahead or len(flat) < 2 * most:
            return ahead
        most *= 2


def _places(flat: Sequence[bytes], start: _Place) -> list[tuple[str, _Place]]:
    """The jobs in `flat`, which alternates groups and scores, without those before `start`."""
    ahead, at, behind = [], math.inf, 0
    for group, score in zip(flat[::2], flat[1::2], strict=True):
        at, behind = (at, behind) if float(score) == at else (float(score), 0)
        for key in reversed(msgspec.msgpack.decode(group, type=list[str])):
            behind += 1
            if at != start.at or behind > start.behind:
                ahead.append((key, _Place(at, behind)))
    return ahead


def _record(key: str, values: Sequence[bytes | None]) -> JobRecord | None:
    """A job's record; None if it has expired or another release wrote it."""
    fields = {name: value.decode() for name, value in zip(_FIELDS, values, strict=True) if value is not None}
    if "state" not in fields:
        return None
    try:
        return record_from(key.removeprefix(job_key("")), fields)
    except msgspec.ValidationError:
        return None


def _place_at(cursor: str) -> _Place:
    if not cursor:
        return _Place()
    found = _CURSOR.fullmatch(cursor)
    if found is None:
        raise wrong_field("cursor", "the `next` of another page", cursor)
    return _Place(float(found[1]), int(found[2]))
