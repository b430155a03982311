"""A Valkey database with the scripts that run there, and a router's part in short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import redis

from broker.port import ForwardOutcome, Outgoing, StoredSnapshot
from broker.valkey import Call, as_text, packed, run
from broker.valkey.forwarding import Forwarded, Taking, forward_answer, forward_call
from broker.valkey.jobs import Claim, Ending, claim_answer, claim_call, finish_call
from broker.valkey.queues import SOURCES, TAKES
from taxiway.contract.job import FINAL
from taxiway.contract.keys import ARRIVALS, SESSIONS, WORK, in_flight_key, job_key, session_key, work_cell
from taxiway.contract.wire import Envelope, encode_envelope
from tests.narrowing import as_bytes
from tests.stored import fields_of

LEASE = 30.0
KEEP = 120
CELL = work_cell("cpu.batch", 1)
_GROUPS = 7  # arguments of forward.lua before its groups
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
        keys = [SESSIONS, session_key(session)]
        return bool(self.run(Call("fleet/session_sign", keys, [session, 5000, "1" if born else ""])))

    def take(self, session: str, most: int = 10, most_bytes: int = 1000) -> list[bytes]:
        """What is taken under a session."""
        return self.exchange(session=session, most=most, most_bytes=most_bytes).taken

    def forward(self, *messages: Outgoing, session: str = "", held: bool = False) -> list[bool]:
        """What of this was forwarded; under a session, all that it took is answered with it."""
        return [one is ForwardOutcome.NEW for one in self.exchange(*messages, session=session, held=held).done]

    def exchange(
        self,
        *messages: Outgoing,
        session: str = "",
        held: bool = False,
        most: int = 0,
        most_bytes: int = 1000,
        snapshots: Sequence[StoredSnapshot] = (),
    ) -> Forwarded:
        """The answer when this is forwarded, and arrivals are taken under a session."""
        takes = in_flight_key(session, TAKES)
        taking = Taking(session_key(session), takes, [takes], most, most_bytes) if session else None
        call = forward_call(messages, taking, keep=KEEP, snapshots=snapshots, held=held)
        plain = {encode_envelope(one.envelope): one.envelope.body.encode() for one in messages}
        groups = [_with_messages(group, plain) for group in call.args[_GROUPS:]]
        return forward_answer(self.run(call._replace(args=[*call.args[:_GROUPS], *groups])))

    def recover(self, session: str, remembered: float = 60.0, most: int = 256) -> int:
        """How many messages are put back."""
        lists = [in_flight_key(session, source) for source in SOURCES]
        keys = [SESSIONS, session_key(session), ARRIVALS, *lists]
        return int(self.run(Call("fleet/session_recover", keys, [session, remembered, most])))

    def claim(self, worker: str, *jobs: str, lease: float = LEASE, deadline: float = 0.0) -> list[Claim]:
        """The claims of these jobs."""
        return claim_answer(self.run(claim_call(worker, lease, [(job, deadline) for job in jobs])))[1]

    def start(self, *runs: tuple[str, str, float], device: str = "cpu:0") -> list[int]:
        """Which of these runs (job, token, time) were recorded."""
        facts = [packed({"token": token, "began": began}) for _, token, began in runs]
        return list(self._on_records("start", [job for job, _, _ in runs], device, *facts))

    def alone(self, *claims: tuple[str, str], alone: bool) -> None:
        """Note whether the claims' worker handles nothing beside."""
        self._on_records("alone", [job for job, _ in claims], int(alone), *(token for _, token in claims))

    def bill(self, job: str, bill: str, dollars: float) -> None:
        """Charge a bill."""
        self._on_records("bill", [job], packed({"id": bill, "dollars": dollars}))

    def renew(self, lease: float, *claims: tuple[str, str]) -> list[int]:
        """Which claims are still held."""
        return list(self._on_records("renew", [job for job, _ in claims], lease, *(token for _, token in claims)))

    def release(self, *claims: tuple[str, str], counts: bool = False) -> None:
        """Release claims."""
        self._on_records("release", [job for job, _ in claims], int(counts), *(token for _, token in claims))

    def _on_records(self, script: str, jobs: Sequence[str], *args: Any) -> Any:
        return self.run(Call(f"jobs/{script}", [job_key(job) for job in jobs], args))

    def finish(self, *endings: Ending, keep_result: int = 60) -> list[int]:
        """Which jobs' results were written."""
        return list(self.run(finish_call(endings, keep_result=keep_result, keep_record=120)))

    def work(self) -> float:
        """Device seconds in the jobs' cell."""
        return float(self.client.hget(WORK, CELL) or 0)

    def record(self, job: str) -> dict[str, str]:
        """A job's record."""
        return fields_of(self.client, job_key(job))


def _with_messages(group: bytes, messages: Mapping[bytes, bytes]) -> bytes:
    """A group of forward.lua with other messages."""
    read = msgspec.msgpack.decode(group)
    for job in read["jobs"]:
        job["message"] = as_text(messages[job["message"].encode()])
    return packed(read)


def placed(job: str, message: bytes = b"m", **fields: str) -> Outgoing:
    """A job placed on cpu.batch."""
    return Outgoing("", "cpu.batch", 0, carrying(message), job, RECORD | fields)


def recorded(job: str, fields: Mapping[str, str] = RECORD) -> Outgoing:
    """A job whose message goes into no class queue."""
    return Outgoing("", "", 1, carrying(b""), job, fields)


def carrying(message: bytes) -> Envelope:
    """An envelope that `Store` stores as these bytes."""
    return Envelope(body=message.decode(), headers={}, properties={})
