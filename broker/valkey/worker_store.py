"""What a worker says to the state store: claims, results, heartbeats and dead letters, each one script or command."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from broker.port import DeadLetter, Holder
from broker.valkey import Call
from broker.valkey.records import (
    Claim,
    Ending,
    bill_call,
    claim_answer,
    claim_call,
    finish_call,
    heartbeat_call,
    over_call,
    read_history,
    release_call,
    renew_call,
    start_call,
    watch_answer,
    watch_call,
)
from tasks.models.folder import Watched
from tasks.topology import Limits
from taxiway.connection import BLOCKING_ANSWER, Connection, ConnectionPool
from taxiway.contract.job import KEEP, MOST_PIECES, Piece, ResultMeta, read_meta
from taxiway.contract.keys import (
    DEAD,
    blob_key,
    job_key,
    result_key,
    stream_key,
    withdrawn_channel,
)
from taxiway.contract.limits import Buffer
from taxiway.contract.values import Reference
from taxiway.contract.wire import outlasted, outlasting
from taxiway.errors import BrokerUnavailableError
from taxiway.valkey import Command, checked, fleet_errors

logger = logging.getLogger(__name__)

KEPT_DEAD = 10_000
"""Dead letters that are kept; the oldest fall off."""

_REMEMBERED = 30 * 86400
"""Seconds for which what was learned of an endpoint is kept."""

_AT_ONCE = 500
"""Jobs that one script looks at, so that the server is not blocked for long by one worker."""

_KEPT_WITHIN = 0.8 * BLOCKING_ANSWER
"""Seconds for which a store is asked whether its log is on its disk. A disk that is so slow has it written at least: it
is lost with the machine only."""

_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0)  # seconds between tries while the store is away; the last repeats

Answer = TypeVar("Answer")


class WorkerStore:
    """One worker's door to the state store. Threads may share it.

    Args:
        worker: the worker's name; claims carry it.
        limits: the lease of a claim, and how long results and records stay.
        device: the label of the device that jobs run on.
    """

    def __init__(self, url: str, worker: str, limits: Limits, device: str = "") -> None:
        self.worker = worker
        self.limits = limits
        self.device = device
        self._connections = ConnectionPool(url)
        self._withdrawn = Connection(url)
        self._keeps = True

    def claim(self, jobs: Sequence[tuple[str, float]]) -> tuple[float, list[Claim]]:
        """The store's time, and the claim of each (job, deadline) in order."""
        return claim_answer(self._run(claim_call(self.worker, self.limits.lease, jobs)))

    def start(self, jobs: Sequence[tuple[str, str, float]]) -> None:
        """Say that the jobs (id, token, store's time) run."""
        if jobs:
            self._run(start_call(self.device, jobs))

    def bill(self, bills: Sequence[tuple[str, str, float]]) -> None:
        """Charge what jobs (id, the bill's id, US dollars) used of endpoints to their tenants."""
        self._run(bill_call(bills))

    def learned(self, key: str) -> bytes:
        """What an earlier worker of the endpoint learned (`keys.learned_key`); empty if nothing is kept."""
        with fleet_errors("state store"):
            (kept,) = checked(self._connections.ask([("GET", key)]))
        return bytes(kept or b"")

    def keep_learned(self, key: str, memory: bytes) -> None:
        """Keep what was learned of an endpoint."""
        with fleet_errors("state store"):
            checked(self._connections.ask([("SET", key, memory, "EX", _REMEMBERED)]))

    def renew(self, claims: Sequence[tuple[str, str]]) -> list[bool]:
        """Prolong the claims (job, token); which of them are still ours, in order."""
        if not claims:
            return []
        return [bool(one) for one in self._run(renew_call(self.limits.lease, claims))]

    def release(self, claims: Sequence[tuple[str, str]], *, counts: bool = False) -> None:
        """Give the claims (job, token) back; whether their runs count."""
        if claims:
            self._run(release_call(claims, counts=counts))

    def let_lapse(self, claims: Sequence[tuple[str, str]]) -> None:
        """Let the claims (job, token) end as if this worker had: their runs count."""
        if claims:
            self._run(renew_call(0.0, claims))

    def finish(self, endings: Iterable[Ending]) -> list[bool]:
        """Write the results, and acknowledge the messages whose tags they have; which were written, in order."""
        call = finish_call(endings, keep_result=self.limits.keep_result, keep_record=self.limits.keep_record)
        return [bool(one) for one in self._run(call)]

    def over(self, jobs: Sequence[tuple[str, float]]) -> list[bool]:
        """Which messages of these (job, deadline) may be forgotten, once the store keeps what it says of them.

        A store that has no log, or cannot tell of it, keeps nothing that could be waited for: it says so once.
        """
        calls = [over_call(self.worker, jobs[start : start + _AT_ONCE]) for start in range(0, len(jobs), _AT_ONCE)]
        commands: list[Command] = [("EVAL", call.text, len(call.keys), *call.keys, *call.args) for call in calls]
        with fleet_errors("state store"):
            *answers, persisted = self._connections.ask([*commands, outlasting(self.limits.durability, _KEPT_WITHIN)])
            checked(answers)
        keeps = outlasted(persisted)
        if self._keeps and not keeps:
            logger.warning("the store may lose results when it is killed", extra={"answer": str(persisted)})
        self._keeps = keeps
        return [bool(one) for answer in answers for one in answer]

    def append(self, pieces: Sequence[tuple[str, Piece]]) -> None:
        """Add the pieces to the streams of their jobs."""
        commands: list[Command] = []
        for job, piece in pieces:
            fields = [part for pair in piece.fields().items() for part in pair]
            commands.append(("XADD", stream_key(job), "MAXLEN", "~", MOST_PIECES, "*", *fields))
            commands.append(("EXPIRE", stream_key(job), KEEP))
        self._calls(*commands)

    def result(self, job: str) -> ResultMeta | None:
        """The job's stored result, if it has one."""
        (raw,) = self._calls(("GET", result_key(job)))
        return read_meta(raw) if raw else None

    def blobs(self, references: Sequence[Reference]) -> dict[str, Buffer | None]:
        """The bytes that each `ref` stands for, None where they are not there any more."""
        contents = self._calls(*(("GET", blob_key(reference.ref)) for reference in references))
        return {reference.ref: content for reference, content in zip(references, contents, strict=True)}

    def keep_blobs(self, contents: Mapping[str, Buffer]) -> None:
        """Store the blobs of results, as long as results stay."""
        keep = self.limits.keep_result
        self._calls(*(("SET", blob_key(ref), content, "EX", keep) for ref, content in contents.items()))

    def beat(self, facts: Any) -> None:
        """Publish the device's facts."""
        self._run(heartbeat_call(self.worker, msgspec.json.encode(facts)))

    def watch(self, arguments: Sequence[str | bytes]) -> Watched:
        """Tell what this worker serves, and hear what operators asked for."""
        return watch_answer(self._run(watch_call(arguments)))

    def retire(self) -> None:
        """Take the device's facts back: it takes no more work."""
        self._run(heartbeat_call(self.worker, b""))

    def withdrawn(self, longest: float) -> list[str]:
        """Jobs held here that were ended since the last call, or in the next `longest` seconds. For one thread."""
        with fleet_errors("state store"):
            if not self._withdrawn.connected:
                self._withdrawn.send([("SUBSCRIBE", withdrawn_channel(self.worker))])
            message = self._withdrawn.next_message(longest)
        said = message is not None and message[0] == b"message"
        return [message[2].decode().removeprefix(job_key(""))] if said else []

    def wake_listener(self) -> None:
        """Let a `withdrawn` that waits return. Any thread may."""
        self._calls(("PUBLISH", withdrawn_channel(self.worker), ""))

    def history(self, job: str) -> tuple[Holder, ...]:
        """Workers that held the job, and ended."""
        (raw,) = self._calls(("HGET", job_key(job), "history"))
        return read_history(raw.decode()) if raw else ()

    def add_dead_letter(self, letter: DeadLetter) -> None:
        """Put a message among the dead letters."""
        push = ("LPUSH", DEAD, msgspec.json.encode(letter))
        self._calls(("MULTI",), push, ("LTRIM", DEAD, 0, KEPT_DEAD - 1), ("EXEC",))

    def _run(self, call: Call) -> Any:
        with fleet_errors("state store"):
            return self._connections.run(call)

    def _calls(self, *commands: Command) -> list[Any]:
        with fleet_errors("state store"):
            return self._connections.calls(*commands)


def insist(call: Callable[[], Answer], given_up: threading.Event, tell: Callable[[str], None]) -> Answer:
    """`call`'s answer, tried until the store is back; `tell` is told once that it is away.

    Raises:
        BrokerUnavailableError: the store is away and `given_up` is set.
    """
    tries = 0
    while True:
        try:
            return call()
        except BrokerUnavailableError as error:
            if tries == 0:
                tell(error.message)
            if given_up.wait(_PAUSES[min(tries, len(_PAUSES) - 1)]):
                raise
            tries += 1
