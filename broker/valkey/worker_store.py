"""What a worker reads and writes in the state store: claims, runs, results, heartbeats and dead letters."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import msgspec

from broker.port import KEPT_DEAD, DeadLetter, Holder
from broker.valkey import Call, packed
from broker.valkey.jobs import Claim, Ending, YieldRequest, claim_answer, claim_call, finish_call, read_history, renewed
from broker.valkey.processes import LeaseHolder, heartbeat_call, lease_answer, lease_call, watch_answer, watch_call
from tasks.models.folder import Watched
from tasks.queues.limits import Limits
from taxiway.backoff import Outage
from taxiway.connection import Connection, ConnectionPool
from taxiway.contract.job import ResultMeta, RunProgress, celery_state, decode_parts, read_meta
from taxiway.contract.keys import DEAD, blob_key, cancelled_channel, job_key, line_key, name_key, result_key, stream_key
from taxiway.contract.limits import Buffer
from taxiway.contract.peers import WaitingLine, read_line
from taxiway.contract.stream import (
    KEEP,
    MOST_PIECES,
    NOTHING,
    CutGeneration,
    Piece,
    decode_kept,
    read_entries,
    with_streamed,
)
from taxiway.contract.values import Reference
from taxiway.errors import BrokerUnavailableError
from taxiway.valkey import Command, fleet_errors, stored

logger = logging.getLogger(__name__)

_FACTS_KEPT = 30 * 86400
"""Seconds for which facts learned about an endpoint are kept."""

_UNCLAIMED = 600
"""Seconds for which a checkpoint's bytes stay that no record names: its worker died in between."""

MOST_REPORTS = 16
"""Approximate number of reports of a run that a stream keeps: a reader wants the latest."""

Answer = TypeVar("Answer")


class JobNotice(NamedTuple):
    """A held job that was cancelled or expired; with a request, the claim of that `token` is to yield instead."""

    job: str
    token: str = ""
    request: YieldRequest | None = None


@dataclass(frozen=True, slots=True)
class RunUpdate:
    """What is new of a run."""

    token: str
    ran: float
    """Seconds for which the job ran, in all its runs."""
    progress: RunProgress | None
    """None if there is no new report."""
    celery: bool
    """The job's producer may look for its state in Celery's result backend."""
    row: int = 0

    def joined(self, after: RunUpdate) -> RunUpdate:
        """This update and the one `after` it as one."""
        return replace(after, progress=after.progress or self.progress)


@dataclass(frozen=True, slots=True)
class EarlierRuns:
    """What is kept of a job's earlier runs."""

    ran: float = 0.0
    """Their seconds."""
    yields: int = 0
    """How many of them yielded."""
    yielded: str = ""
    """Why one did last; empty if none did."""
    checkpoints: tuple[bytes, ...] = ()
    """The facts of their last ones, latest first."""


class WorkerStore:
    """One worker's access to the state store. Thread-safe, except `notices`.

    Args:
        worker: the worker's name; claims carry it.
        limits: the lease of a claim, and how long results and records are kept.
        device: the label of the device that jobs run on.
    """

    def __init__(self, url: str, worker: str, limits: Limits, device: str = "") -> None:
        self.worker = worker
        self.limits = limits
        self.device = device
        self._connections = ConnectionPool(url, server="state store")
        self._cancellations = Connection(url)

    def claim(self, jobs: Sequence[tuple[str, float]]) -> tuple[float, list[Claim]]:
        """Claim jobs, given with their deadlines; returns the store's time and each job's claim, in order."""
        return claim_answer(self._connections.run(claim_call(self.worker, self.limits.lease, jobs)))

    def start(self, jobs: Sequence[tuple[str, str, float]]) -> None:
        """Record that jobs (id, token, store's time) run."""
        runs = [packed({"token": token, "began": began}) for _, token, began in jobs]
        self._run("jobs/start", jobs, self.device, *runs)

    def alone(self, claims: Sequence[tuple[str, str]], *, alone: bool) -> None:
        """Record whether this worker handles nothing beside each of these jobs: its end would be blamed on them."""
        self._run("jobs/alone", claims, int(alone), *_tokens(claims))

    def bill(self, bills: Sequence[tuple[str, str, float]]) -> None:
        """Charge tenants for what their jobs (id, the bill's id, US dollars) used of endpoints."""
        self._run("jobs/bill", bills, *(packed({"id": bill, "dollars": dollars}) for _, bill, dollars in bills))

    def learned(self, key: str) -> bytes:
        """What an earlier worker learned about the endpoint (`keys.learned_key`); empty if nothing is kept."""
        kept = self._connections.call("GET", key)
        return bytes(kept or b"")

    def waiting_line(self, peer: str) -> WaitingLine | None:
        """Where a connection of a peer waits for work; None if none does."""
        found = self._connections.call("GET", line_key(peer))
        return None if found is None else read_line(found)

    def keep_learned(self, key: str, memory: bytes) -> None:
        """Keep what was learned about an endpoint."""
        self._connections.call("SET", key, memory, "EX", _FACTS_KEPT)

    def keep(self, kept: Sequence[tuple[str, str, CutGeneration]]) -> None:
        """Keep what there is of generations (job, token), as far as their claims are still held."""
        one_each = [
            packed({"token": token, "text": _json(msgspec.structs.replace(one, parts=())), "parts": _json(one.parts)})
            for _, token, one in kept
        ]
        self._run("jobs/keep", kept, *one_each)

    def kept(self, job: str) -> CutGeneration:
        """What is left of a generation: what was kept of it, and what readers of its stream got beyond that."""
        fields, entries = self._connections.calls(
            ("HMGET", job_key(job), "generation", "parts"), ("XRANGE", stream_key(job), "-", "+")
        )
        pieces = [piece for _, piece in read_entries(entries) if isinstance(piece, Piece)]
        return with_streamed(_kept(*fields), pieces)

    def renew(self, claims: Sequence[tuple[str, str]]) -> Sequence[YieldRequest | bool]:
        """Renew claims (job, token); returns for each, in order, whether it is still ours, and is to yield."""
        return [renewed(one) for one in self._run("jobs/renew", claims, self.limits.lease, *_tokens(claims))]

    def release(self, claims: Sequence[tuple[str, str]], *, counts: bool = False) -> None:
        """Release claims (job, token); `counts` says whether their runs count as attempts."""
        self._run("jobs/release", claims, int(counts), *_tokens(claims))

    def let_lapse(self, claims: Sequence[tuple[str, str]]) -> None:
        """Let claims (job, token) expire, as if this worker had died: their runs count."""
        self._run("jobs/renew", claims, 0.0, *_tokens(claims))

    def finish(self, endings: Iterable[Ending]) -> list[bool]:
        """Write results and acknowledge the messages whose tags they have; returns which were written, in order."""
        call = finish_call(endings, keep_result=self.limits.keep_result, keep_record=self.limits.keep_record)
        return [bool(one) for one in self._connections.run(call)]

    def append(self, pieces: Sequence[tuple[str, Piece | RunUpdate]]) -> None:
        """Append pieces to the streams of their jobs, and record what runs reported."""
        commands: list[Command] = []
        for job, piece in pieces:
            if isinstance(piece, RunUpdate):
                self._report(job, piece)
                continue
            fields = [part for pair in piece.fields().items() for part in pair]
            commands.append(("XADD", stream_key(job), "MAXLEN", "~", MOST_PIECES, "*", *fields))
            commands.append(("EXPIRE", stream_key(job), KEEP))
        if commands:
            self._connections.calls(*commands)

    def _report(self, job: str, update: RunUpdate) -> None:
        progress = update.progress
        run = {
            "token": update.token,
            "ran": update.ran,
            "progress": "" if progress is None else msgspec.json.encode(progress).decode(),
            "state": "" if progress is None or not update.celery else celery_state(job, progress).decode(),
        }
        keys = [job_key(job), stream_key(job), result_key(job)]
        self._connections.run(Call("runs/report", keys, [KEEP, MOST_REPORTS, packed(run)]))

    def earlier_runs(self, job: str) -> EarlierRuns:
        """What is kept of a job's earlier runs."""
        fields = ("ran", "yields", "yielded", "checkpoint", "checkpoint_before")
        ran, yields, yielded, *checkpoints = self._connections.call("HMGET", job_key(job), *fields)
        kept = tuple(filter(None, checkpoints))
        return EarlierRuns(float(ran or 0), int(yields or 0), (yielded or b"").decode(), kept)

    def checkpoint(self, key: str) -> Buffer | None:
        """A checkpoint's bytes; None if they have expired."""
        content: Buffer | None = self._connections.call("GET", key)
        return content

    def keep_checkpoint(self, job: str, token: str, key: str, content: Buffer, facts: bytes, ran: float) -> bool:
        """Make these bytes the job's last checkpoint, under a new `key`; False if the claim is no longer ours.

        `ran` is the seconds of all runs of the job.
        """
        run = {"token": token, "ran": ran, "checkpoint": facts.decode()}
        call = Call("runs/checkpoint", [job_key(job), key], [packed(run)])
        return bool(self._connections.run(call, *stored(key, content, _UNCLAIMED)))

    def result(self, job: str) -> ResultMeta | None:
        """The job's stored result, if it has one."""
        (raw,) = self._connections.calls(("GET", result_key(job)))
        return read_meta(raw) if raw else None

    def blobs(self, references: Sequence[Reference]) -> dict[str, Buffer | None]:
        """The bytes of each referenced blob, by `ref`; None if it has expired."""
        contents = self._connections.calls(*(("GET", blob_key(reference.ref)) for reference in references))
        return {reference.ref: content for reference, content in zip(references, contents, strict=True)}

    def keep_blobs(self, contents: Mapping[str, Buffer]) -> None:
        """Store the blobs of results for as long as results are kept."""
        keep = self.limits.keep_result
        writes = (stored(blob_key(ref), content, keep) for ref, content in contents.items())
        self._connections.calls(*chain.from_iterable(writes))

    def beat(self, facts: Any) -> None:
        """Publish the device's facts."""
        self._connections.run(heartbeat_call(self.worker, msgspec.json.encode(facts)))

    def watch(self, arguments: Sequence[str | bytes]) -> Watched:
        """Report what this worker serves; returns what operators requested."""
        return watch_answer(self._connections.run(watch_call(arguments)))

    def retire(self) -> None:
        """Remove the device's facts: it takes no more work."""
        self._connections.run(heartbeat_call(self.worker, b""))

    def hold_name(self, process: str, seconds: float) -> LeaseHolder:
        """Hold the worker's name for this process; 0 seconds leave it."""
        return lease_answer(self._connections.run(lease_call([name_key(self.worker)], process, seconds)))

    def notices(self, longest: float) -> list[JobNotice]:
        """Jobs held here that ended or are to yield, as announced within `longest` seconds. For one thread."""
        with fleet_errors("state store"):
            if not self._cancellations.connected:
                self._cancellations.send([("SUBSCRIBE", cancelled_channel(self.worker))])
            message = self._cancellations.next_message(longest)
        if message is None or message[0] != b"message":
            return []
        return [_notice(message[2])]

    def wake_listener(self) -> None:
        """End a waiting call of `notices`. Thread-safe."""
        self._connections.calls(("PUBLISH", cancelled_channel(self.worker), ""))

    def history(self, job: str) -> tuple[Holder, ...]:
        """Workers that died while they held the job."""
        (raw,) = self._connections.calls(("HGET", job_key(job), "history"))
        return read_history(raw.decode()) if raw else ()

    def add_dead_letter(self, dead_letter: DeadLetter) -> None:
        """Store a dead letter."""
        push = ("LPUSH", DEAD, msgspec.json.encode(dead_letter))
        self._connections.calls(("MULTI",), push, ("LTRIM", DEAD, 0, KEPT_DEAD - 1), ("EXEC",))

    def _run(self, script: str, jobs: Sequence[tuple[str, Any] | tuple[str, Any, Any]], *args: Any) -> Sequence[Any]:
        """What a script answers for the records of jobs, which are first in each tuple; nothing if there are none."""
        if not jobs:
            return []
        answers: Sequence[Any] = self._connections.run(Call(script, [job_key(job[0]) for job in jobs], args))
        return answers


def _tokens(claims: Sequence[tuple[str, str]]) -> list[str]:
    return [token for _, token in claims]


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _kept(generation: bytes | None, parts: bytes | None) -> CutGeneration:
    """What is kept in the fields of a job's record; nothing if another release wrote them."""
    try:
        kept = decode_kept(generation) if generation else NOTHING
        return msgspec.structs.replace(kept, parts=decode_parts(parts or b"[]"))
    except msgspec.MsgspecError:
        return NOTHING


def _notice(message: bytes) -> JobNotice:
    """As finish.lua announces an end, by the job's key, and yield.lua a request."""
    if message.startswith(job_key("").encode()) or not message:
        return JobNotice(message.decode().removeprefix(job_key("")))
    job, token, seconds, reason = msgspec.msgpack.decode(message, type=tuple[str, str, str, str])
    return JobNotice(job.removeprefix(job_key("")), token, YieldRequest(float(seconds), reason))


def insist(call: Callable[[], Answer], given_up: threading.Event, outage: Outage) -> Answer:
    """The value of `call`, retried while the store is unavailable.

    Raises:
        BrokerUnavailableError: the store is unavailable and `given_up` is set.
    """
    while True:
        try:
            answer = call()
        except BrokerUnavailableError as error:
            if given_up.wait(outage.pause(error)):
                raise
        else:
            outage.over()
            return answer
