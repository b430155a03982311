"""A Valkey database with the scripts that run there, and a router's part in short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from broker.port import StoredSnapshot
from broker.valkey.forwarding import Forward, Forwarded, Taking, forward_answer, forward_call
from broker.valkey.lua import Call, run
from broker.valkey.queues import TAKES, recover_call, sign_call
from broker.valkey.records import Claim, Ending, claim_answer, claim_call, finish_call
from taxiway.contract.job import FINAL
from taxiway.contract.keys import WORK, in_flight_key, job_key, session_key, work_cell
from tests.narrowing import as_bytes
from tests.stored import fields_of

LEASE = 30.0
CELL = work_cell("cpu.batch", 1)
RECORD = {"state": "queued", "model": "echo:1", "cell": CELL, "work": "0.25"}


def is_held(client: redis.Redis, job: str) -> bool:
    """Whether a worker holds a job that has not ended, and the lease is not over."""
    state, holder, until = client.hmget(job_key(job), "state", "holder", "held_until")
    seconds, microseconds = client.time()
    if not holder or state in {one.encode() for one in FINAL}:
        return False
    return float(as_bytes(until)) > seconds + microseconds / 1e6


class Store:
    """A Valkey database and the scripts that run there."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client

    def run(self, call: Call) -> Any:
        """The script's answer."""
        return run(self.client, call)

    def live(self, session: str, *, born: bool = False) -> bool:
        """Show that a session lasts."""
        return bool(self.run(sign_call(session, 5.0, begins=born))[1])

    def take(self, session: str, most: int = 10, most_bytes: int = 1000) -> list[bytes]:
        """What is taken under a session."""
        return self.exchange(session=session, most=most, most_bytes=most_bytes).taken

    def forward(self, *forwards: Forward, session: str = "") -> list[bool]:
        """What of this was forwarded; under a session, all that it took is answered with it."""
        return self.exchange(*forwards, session=session).done

    def exchange(
        self,
        *forwards: Forward,
        session: str = "",
        most: int = 0,
        most_bytes: int = 1000,
        snapshots: Sequence[StoredSnapshot] = (),
    ) -> Forwarded:
        """The answer when this is forwarded, and arrivals are taken under a session."""
        takes = in_flight_key(session, TAKES)
        taking = Taking(session_key(session), takes, [takes], most, most_bytes) if session else None
        return forward_answer(self.run(forward_call(forwards, taking, snapshots=snapshots)))

    def recover(self, session: str, remembered: float = 60.0, most: int = 256) -> int:
        """How many messages are put back."""
        return int(self.run(recover_call(session, remembered, most)))

    def claim(self, worker: str, *jobs: str, lease: float = LEASE, deadline: float = 0.0) -> list[Claim]:
        """The claims of these jobs."""
        return claim_answer(self.run(claim_call(worker, lease, [(job, deadline) for job in jobs])))[1]

    def finish(self, *endings: Ending, keep_result: int = 60) -> list[int]:
        """Which jobs' results were written."""
        return list(self.run(finish_call(endings, keep_result=keep_result, keep_record=120)))

    def work(self) -> float:
        """Device seconds in the jobs' cell."""
        return float(self.client.hget(WORK, CELL) or 0)

    def record(self, job: str) -> dict[str, str]:
        """A job's record."""
        return fields_of(self.client, job_key(job))


def placed(job: str, message: bytes = b"m", **fields: str) -> Forward:
    """A job placed on cpu.batch."""
    return Forward(queue_list="cpu.batch", message=message, job=job, fields=RECORD | fields, keep=120)
