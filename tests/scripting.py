"""A Valkey database with the scripts that run there, and a router's part in short."""

from __future__ import annotations

from typing import Any

import redis

from broker.valkey.forwarding import FORWARD, LIVE, RECOVER, Forward, Forwarded, forward_answer, forward_args
from broker.valkey.scripts import CLAIM, FINISH, Claim, Ending, claim_answer, claim_args, finish_args
from broker.valkey.sessions import SOURCES, TAKES
from taxiway.contract.job import FINAL
from taxiway.contract.keys import (
    ARRIVALS,
    LENGTHS,
    LIVES,
    WORK,
    job_key,
    life_key,
    priority_lists,
    taken_key,
    work_cell,
)

UNACKED = ("unacked", "unacked_index")
"""kombu's own names."""

LEASE = 30.0
CELL = work_cell("cpu.batch", 1)
RECORD = {"state": "queued", "model": "echo:1", "cell": CELL, "work": "0.25"}


def is_held(client: redis.Redis, job: str) -> bool:
    """Whether a worker holds a job that has not ended, and the lease is not over."""
    state, holder, until = client.hmget(job_key(job), "state", "holder", "held_until")
    seconds, microseconds = client.time()
    return bool(holder) and state not in {one.encode() for one in FINAL} and float(until) > seconds + microseconds / 1e6


class Store:
    """A Valkey database and the scripts that run there."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self._scripts: dict[str, Any] = {}

    def run(self, script: str, keys: list[str], args: list[Any]) -> Any:
        """The script's answer."""
        if script not in self._scripts:
            self._scripts[script] = self.client.register_script(script)
        return self._scripts[script](keys=keys, args=args)

    def live(self, life: str, *, born: bool = False) -> bool:
        """Show that a life lasts."""
        return bool(self.run(LIVE, [LIVES, life_key(life)], [life, 5000, "1" if born else ""])[1])

    def take(self, life: str, most: int = 10, most_bytes: int = 1000) -> list[bytes]:
        """What is taken under a life."""
        return self.exchange(life=life, most=most, most_bytes=most_bytes).taken

    def forward(self, *forwards: Forward, life: str = "") -> list[bool]:
        """What of this was forwarded; under a life, all that it took is answered with it."""
        return self.exchange(*forwards, life=life).done

    def exchange(self, *forwards: Forward, life: str = "", most: int = 0, most_bytes: int = 1000) -> Forwarded:
        """The answer when this is forwarded, and arrivals are taken under a life."""
        takes = taken_key(life, TAKES)
        keys = [*priority_lists(ARRIVALS), takes, takes] if life else []
        args = forward_args(forwards, life_key(life) if life else "", most=most, most_bytes=most_bytes)
        return forward_answer(self.run(FORWARD, keys, args))

    def recover(self, life: str, remembered: float = 60.0, most: int = 256) -> int:
        """How many messages are put back."""
        keys = [LIVES, life_key(life), ARRIVALS, *(taken_key(life, source) for source in SOURCES)]
        return int(self.run(RECOVER, keys, [life, remembered, most]))

    def claim(self, worker: str, *jobs: str, lease: float = LEASE, deadline: float = 0.0) -> list[Claim]:
        """The claims of these jobs."""
        args = claim_args(worker, lease, [(job, deadline) for job in jobs])
        return claim_answer(self.run(CLAIM, [], args))[1]

    def finish(self, *endings: Ending, keep_result: int = 60) -> list[int]:
        """Which jobs' results were written."""
        args = finish_args(endings, keep_result=keep_result, keep_record=120)
        return list(self.run(FINISH, [WORK, LENGTHS, *UNACKED], args))

    def work(self) -> float:
        """Device seconds in the jobs' cell."""
        return float(self.client.hget(WORK, CELL) or 0)

    def record(self, job: str) -> dict[str, str]:
        """A job's record."""
        return {name.decode(): value.decode() for name, value in self.client.hgetall(job_key(job)).items()}


def placed(job: str, message: bytes = b"m", **fields: str) -> Forward:
    """A job placed on cpu.batch."""
    return Forward(queue_list="cpu.batch", message=message, job=job, fields=RECORD | fields, keep=120)
