"""A worker's side of its class queue on Valkey or Redis, compatible with kombu: the same lists, hash and index.

One script moves messages by priority into the unacked hash and claims their jobs, so other workers and tools that read
these keys keep working. An idle worker blocks on `BLMOVE queue queue RIGHT RIGHT`, which leaves the message in place;
the script is pipelined behind it on the same connection, so one answer wakes the worker and brings its messages. The
script takes up to the capacity that the worker announced last, once, whichever list woke it. A worker that was woken
and has emptied its queue announces its capacity and blocks again in one packet, without waiting for an answer to the
announcement. kombu needs two round trips and 150 µs per message. The messages of a silent worker return to the front of
their queue; kombu would put them last, by some host's clock.
"""

from __future__ import annotations

import math
import select
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from broker.valkey import Call
from broker.valkey.jobs import Claim, claim_from
from tasks.queues.limits import Limits
from taxiway.connection import BLOCKING_ANSWER, Connection, ConnectionPool
from taxiway.contract.keys import (
    DEVICES,
    HEARTBEATS,
    LEVELS,
    PATIENT,
    UNACKED,
    affinity_key,
    capacity_key,
    job_key,
    priority_lists,
    result_key,
)
from taxiway.errors import FleetUnavailable
from taxiway.valkey import Command, checked, fleet_errors, is_unknown_script, parse

TAKEN_AT_MOST = 256
"""Most messages that one script takes: a limit on how long one worker blocks the server."""

_NO_DEADLINE = 1e18  # seconds

_USED = b"0 0"  # the capacity that `wait` announced has been used


class FetchedMessage(msgspec.Struct, frozen=True):
    """A message with its tag and the claim on its job."""

    tag: str
    raw: bytes
    job: str
    claim: Claim | None

    @property
    def token(self) -> str:
        """The claim's fencing token; empty without a claim."""
        return self.claim.token if self.claim is not None else ""


@dataclass(frozen=True, slots=True)
class TakenMessages:
    """What one script took from a queue, in serving order, at `now` by the store's clock."""

    queue: str
    now: float
    messages: list[FetchedMessage]


class ClassQueue:
    """A worker's side of the queues that it consumes. Thread-safe, except `take` and `wait`: one thread calls these.

    Args:
        worker: the worker's name; claims carry it.
        ahead: most seconds of patient work that a worker takes.
        affinity: whether routers may prefer this worker for messages of its queue.
    """

    def __init__(
        self, url: str, worker: str, limits: Limits, *, ahead: float = math.inf, affinity: bool = False
    ) -> None:
        self._url = url
        self._connections = ConnectionPool(url, server="state store")
        self._lease = limits.lease
        self._claim_args = [worker, limits.lease, result_key(""), job_key("")]
        self._claim_args += [min(ahead, _NO_DEADLINE), TAKEN_AT_MOST, PATIENT, int(affinity)]
        self._capacity = capacity_key(worker)
        self._preferring, self._preferred = affinity_key(worker), affinity
        self._events = f"/{parse(url).database}."
        self._tags = f"{uuid.uuid4().hex[:12]}."
        self._takes = 0
        self._blocked: dict[str, Connection] = {}
        self._free: list[Connection] = []  # of those that block
        self._rope, self._bell = socket.socketpair()

    def take(self, queue: str, most: int, levels: int = LEVELS) -> TakenMessages:
        """Up to `most` messages of the queue's first `levels`, by priority, then by age, with the claims on their jobs.

        `wait` takes the rest as it arrives.
        """
        self._takes += 2  # each take has a number, and messages taken by `wait` have the next one
        call = self._take_call(queue, levels, min(most, TAKEN_AT_MOST), self._takes)
        return self._fetched(queue, self._connections.run(call))

    def wait(
        self, queues: Sequence[str], longest: float, levels: int = LEVELS, capacity: int = 0
    ) -> list[TakenMessages]:
        """Block for up to `longest` seconds until a message is in one of the queues' `levels`; returns what was taken.

        It takes at most `capacity` messages from one queue; without it, as many as the last `take` was short of. An
        empty list means: call `take`. A worker that was just woken passes `capacity`, and saves that call.
        """
        try:
            own = [self._preferring] if self._preferred else []
            lists = [(name, queue) for queue in queues for name in (*own, *priority_lists(queue)[:levels])]
            with fleet_errors("state store"):
                return self._wait(lists, longest, levels, capacity)
        except FleetUnavailable:
            for name in [*self._blocked]:
                self._leave(name)
            raise

    def wake(self) -> None:
        """End `wait` permanently. Thread-safe."""
        self._rope.close()

    def acknowledge(self, tags: Sequence[str]) -> None:
        """Acknowledge messages."""
        if tags:
            self._connections.calls(("ZREM", UNACKED[1], *tags), ("HDEL", UNACKED[0], *tags))

    def put_back(self, tags: Sequence[str]) -> None:
        """Return messages, given in the order in which they were taken, to their places in their queues."""
        if tags:
            self._connections.run(Call("queues/put_back", UNACKED, [*reversed(tags)]))

    def renew(self, tags: Sequence[str]) -> None:
        """Renew the lease on messages; without it they return to their queues when it expires."""
        if tags:
            self._connections.run(Call("queues/keep", UNACKED[1:], tags))

    def recover(self) -> int:
        """Return the messages of workers that were silent for a lease to their queues; returns their number."""
        recovered: int = self._connections.run(Call("queues/recover", UNACKED, [self._lease, TAKEN_AT_MOST]))
        return recovered

    def message(self, tag: str) -> bytes:
        """An unacknowledged message's bytes; empty if it is no longer held."""
        entry: bytes = self._connections.call("HGET", UNACKED[0], tag) or b""
        return entry[1:].rsplit(b', "', 2)[0]

    def publish(self, topic: str, message: bytes) -> int:
        """Publish to a kombu fanout exchange: `topic` is its name, a slash and the routing key. Returns to how many."""
        received: int = self._connections.call("PUBLISH", self._events + topic, message)
        return received

    def _take_call(self, queue: str, levels: int, *most_and_number: int) -> Call:
        """A call that takes from the queue; without the numbers, up to the announced capacity."""
        lists = priority_lists(queue)[:levels]
        keys = [*UNACKED, self._capacity, DEVICES, HEARTBEATS, self._preferring, *lists]
        args = [self._tags, f', "{queue}", "{queue}"]', *self._claim_args]
        return Call("queues/take", keys, [*args, *most_and_number])

    def _fetched(self, queue: str, answer: Sequence[bytes]) -> TakenMessages:
        now, take, *rest = answer
        prefix = f"{self._tags}{take.decode()}."
        each = zip(rest[::4], rest[1::4], rest[2::4], rest[3::4], strict=True)
        messages = [
            FetchedMessage(f"{prefix}{n}", raw, job.decode(errors="replace"), claim_from(*claim) if claim[0] else None)
            for n, (raw, job, *claim) in enumerate(each)
        ]
        return TakenMessages(queue, float(now), messages)

    def _wait(
        self, lists: Sequence[tuple[str, str]], longest: float, levels: int, capacity: int
    ) -> list[TakenMessages]:
        for name in self._blocked.keys() - {name for name, _ in lists}:  # of a class that the worker no longer serves
            self._leave(name)
        left = [(name, queue) for name, queue in lists if name not in self._blocked]
        if capacity and not left:
            return []  # no connection to announce it on
        first = self._announcement(lists[0][1], capacity) if capacity else []
        for name, queue in left:
            connection = self._free.pop() if self._free else Connection(self._url)
            blocking = ("BLMOVE", name, name, "RIGHT", "RIGHT", 0)  # until the list has a message; then it takes
            connection.send([*first, blocking, self._take_call(queue, levels).command])
            self._blocked[name], first = connection, []
        queue_of = dict(lists)
        fetches = self._woken(queue_of, longest, until_rung=True)
        if not fetches and self._connections.call("GETDEL", self._capacity) == _USED:
            # Taken in the meantime: the answer to that may come after this one, also where the bell has rung
            fetches = self._woken(queue_of, BLOCKING_ANSWER, until_rung=False)
        return fetches

    def _announcement(self, queue: str, capacity: int) -> list[Command]:
        """The commands that announce the capacity for `wait`. They have no answer: one would end the wait."""
        self._takes += 2
        announced = f"{min(capacity, TAKEN_AT_MOST)} {self._takes + 1}" + (f" {queue}" if self._preferred else "")
        return [("CLIENT", "REPLY", "SKIP"), ("SET", self._capacity, announced, "PX", int(self._lease * 1000))]

    def _woken(self, queue_of: Mapping[str, str], longest: float, *, until_rung: bool) -> list[TakenMessages]:
        """The messages that connections took that were woken within `longest` seconds, or until the bell rings."""
        poller = select.poll()
        if until_rung:
            poller.register(self._bell, select.POLLIN)
        listening = {connection.fileno(): name for name, connection in self._blocked.items()}
        for descriptor in listening:
            poller.register(descriptor, select.POLLIN)
        woken = [listening[descriptor] for descriptor, _ in poller.poll(longest * 1000) if descriptor in listening]
        fetches = [self._fetched(queue_of[name], answer) for name in woken if (answer := self._answer(name))]
        return [fetched for fetched in fetches if fetched.messages]

    def _answer(self, name: str) -> list[bytes]:
        """The script's answer, which follows the answer that woke the connection."""
        connection = self._blocked.pop(name)
        moved, answer = connection.read(2)
        self._free.append(connection)
        checked([moved])
        if is_unknown_script(answer):
            return []  # the server restarted: the next take loads the script again
        found: list[bytes] = checked([answer])[0]
        return found

    def _leave(self, name: str) -> None:
        connection = self._blocked.pop(name)
        connection.close()
        self._free.append(connection)
