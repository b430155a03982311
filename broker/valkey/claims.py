"""Claims on jobs: a worker's exclusive right to run one, for a lease, under a fencing token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from broker.port import Holder
from broker.valkey.lua import Call
from taxiway.contract.job import JobState
from taxiway.contract.keys import job_key, kept_key, result_key


class Verdict(StrEnum):
    """What became of a claim."""

    RUN = "run"
    FINAL = "final"
    LATE = "late"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Claim:
    """One job's claim: its fencing token where it may run, seconds until it may be tried again where it is held.

    `attempts` counts the runs that are known to have begun, and `claims` the claims that were not given back, this one
    included: more than one says that a worker ended while it held the job.
    """

    verdict: Verdict
    token: str = ""
    retry_in: float = 0.0
    attempts: int = 0
    claims: int = 1


def claim_call(worker: str, lease: float, jobs: Sequence[tuple[str, float]]) -> Call:
    """Claims jobs, given by id and deadline by the server's clock, 0 where there is none."""
    return Call("claim", _results_and_records(jobs), [worker, lease, *(deadline for _, deadline in jobs)])


def over_call(worker: str, jobs: Sequence[tuple[str, float]]) -> Call:
    """Answers 1 for each of these jobs (as in `claim_call`) whose message may be forgotten, once that is kept."""
    return Call("over", [kept_key(worker), *_results_and_records(jobs)], [deadline for _, deadline in jobs])


def claim_answer(answer: Sequence[bytes]) -> tuple[float, list[Claim]]:
    """The server's time, and each job's claim in order."""
    return float(answer[0]), [claim_from(*pair) for pair in zip(answer[1::2], answer[2::2], strict=True)]


def claim_from(verdict: bytes, value: bytes) -> Claim:
    """One claim, as `includes/claimed.lua` answers it."""
    if verdict == b"run":
        token, attempts, claims = value.decode().rsplit(" ", 2)
        return Claim(Verdict.RUN, token, attempts=int(attempts), claims=int(float(claims)))
    kind = Verdict(verdict.decode())
    return Claim(kind, retry_in=float(value) if kind is Verdict.HELD else 0.0)


def read_history(text: str) -> tuple[Holder, ...]:
    """The holders in a job's record, the first first, as `includes/claimed.lua` writes them."""
    lines = (line.rsplit(" ", 2) for line in text.splitlines())
    return tuple(Holder(worker, float(since), state == JobState.RUNNING) for worker, since, state in lines)


def start_call(device: str, jobs: Iterable[tuple[str, str, float]]) -> Call:
    """Records that jobs run, given by id and token, and since when by the server's clock."""
    ids, tokens, times = zip(*jobs, strict=True)
    return Call("start", _records(ids), [device, *(part for pair in zip(tokens, times, strict=True) for part in pair)])


def renew_call(lease: float, claims: Iterable[tuple[str, str]]) -> Call:
    """Prolongs claims, given by job and token; answers 1 for each that is still ours."""
    ids, tokens = zip(*claims, strict=True)
    return Call("renew", _records(ids), [lease, *tokens])


def release_call(claims: Iterable[tuple[str, str]]) -> Call:
    """Gives claims back, given by job and token."""
    ids, tokens = zip(*claims, strict=True)
    return Call("release", _records(ids), tokens)


def _results_and_records(jobs: Sequence[tuple[str, float]]) -> list[str]:
    return [key for job, _ in jobs for key in (result_key(job), job_key(job))]


def _records(jobs: Iterable[Any]) -> list[str]:
    return [job_key(job) for job in jobs]
