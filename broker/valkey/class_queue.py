"""A worker's hold on its class's queue on Valkey or Redis, beside kombu and in kombu's own lists, hash and index.

One script takes messages by priority into the unacked hash, and claims their jobs, so that other workers and all tools
that read them go on as before. An idle worker blocks on `BLMOVE queue queue RIGHT RIGHT`, which leaves a message where
it was, with the script behind it in the same connection: one answer wakes it and brings what it wakes for. That script
takes what the worker said last that it has room for, once, whichever list wakes it. kombu's own way costs two round
trips and 150 µs a message. What a silent worker held comes back to the front of its queue; kombu would put it last, by
some host's clock.
"""

from __future__ import annotations

import math
import select
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.valkey.lua import Call
from broker.valkey.records import Claim, claim_from
from tasks.topology import Limits
from taxiway.contract.durability import refusal
from taxiway.contract.keys import (
    DEVICES,
    HEARTBEATS,
    LEVELS,
    PATIENT,
    UNACKED,
    job_key,
    priority_lists,
    result_key,
    room_key,
)
from taxiway.valkey.address import parse
from taxiway.valkey.blocking import ANSWER, Connection, Connections
from taxiway.valkey.resp import ServerError, checked, fleet_errors, is_unknown_script

MOST = 256
"""Messages that one script takes, so that the server is not blocked for long by one worker."""

_ENDLESS = 1e18  # seconds

_USED = b"0 0"  # says a room that was given to `wait`, and was taken


@dataclass(frozen=True, slots=True)
class Taken:
    """One message with its tag, and the claim on the job that it names."""

    tag: str
    raw: bytes
    job: str
    claim: Claim | None

    @property
    def token(self) -> str:
        """The token under which the job was claimed; empty where it was not."""
        return self.claim.token if self.claim is not None else ""


@dataclass(frozen=True, slots=True)
class Haul:
    """What one script took from a queue, first served first, at `now` by the store's clock."""

    queue: str
    now: float
    taken: list[Taken]


class ClassQueue:
    """A worker's hold on the queues that it consumes. Threads may share it, but for `take` and `wait`, which one calls.

    Args:
        worker: the worker's name; claims carry it.
        claiming: whether broker and state are one server, so that what is taken is claimed by the same step.
        ahead: seconds of patient work after which a take takes no more of it, where broker and state are one server.
    """

    def __init__(self, url: str, worker: str, limits: Limits, *, claiming: bool, ahead: float = math.inf) -> None:
        self.acknowledges_with_result = claiming
        self._url = url
        self._connections = Connections(url)
        self._lease = limits.lease
        self._claim_args = [worker if claiming else "", limits.lease, result_key(""), job_key("")]
        self._claim_args += [min(ahead, _ENDLESS), MOST, PATIENT]
        self._room = room_key(worker)
        self._events = f"/{parse(url).database}."
        self._tags = f"{uuid.uuid4().hex[:12]}."
        self._takes = 0
        self._blocked: dict[str, Connection] = {}
        self._free: list[Connection] = []  # of those that block
        self._rope, self._bell = socket.socketpair()

    def take(self, queue: str, most: int, levels: int = LEVELS) -> Haul:
        """Up to `most` messages by priority, then by age, with the claims on their jobs; `wait` takes the rest.

        Only those of the queue's first `levels` are taken.
        """
        self._takes += 2  # each take has its number: the second is of what `wait` takes
        call = self._take_call(queue, levels, min(most, MOST), self._takes)
        return self._haul(queue, self._run(call))

    def wait(self, queues: Sequence[str], longest: float, levels: int = LEVELS) -> list[Haul]:
        """What came as the first message stood in one of the queues' `levels`, at the latest after `longest` seconds.

        It is no more than the last `take` was short of, and of one queue; nothing where only a look is worthwhile.
        """
        try:
            lists = [(name, queue) for queue in queues for name in priority_lists(queue)[:levels]]
            return self._wait(lists, longest, levels)
        except (ServerError, OSError) as error:
            for name in [*self._blocked]:
                self._leave(name)
            raise refusal("broker", error) from error

    def wake(self) -> None:
        """End `wait`, now and for good. Any thread may."""
        self._rope.close()

    def acknowledge(self, tags: Sequence[str]) -> None:
        """Forget messages that were answered."""
        if tags:
            with fleet_errors("broker"):
                self._connections.calls(("ZREM", UNACKED[1], *tags), ("HDEL", UNACKED[0], *tags))

    def put_back(self, tags: Sequence[str]) -> None:
        """Return messages, given in the order in which they were taken, to their places in their queues."""
        if tags:
            self._run(Call("queues/put_back", UNACKED, [*reversed(tags)]))

    def keep(self, tags: Sequence[str]) -> None:
        """Say that the messages are still held, or they return to their queues when a lease is over."""
        if tags:
            self._run(Call("queues/keep", UNACKED[1:], tags))

    def recover(self) -> int:
        """Return what a worker held that has been silent for a lease to its place in its queue; how many messages."""
        recovered: int = self._run(Call("queues/recover", UNACKED, [self._lease, MOST]))
        return recovered

    def message(self, tag: str) -> bytes:
        """A message that is held, as it was taken; empty where it is not held any more."""
        with fleet_errors("broker"):
            entry: bytes = self._connections.call("HGET", UNACKED[0], tag) or b""
        return entry[1:].rsplit(b', "', 2)[0]

    def publish(self, topic: str, message: bytes) -> None:
        """Publish on a fanout exchange of kombu's: `topic` is its name, a slash and the routing key."""
        with fleet_errors("broker"):
            self._connections.call("PUBLISH", self._events + topic, message)

    def _take_call(self, queue: str, levels: int, *most_and_number: int) -> Call:
        """A take from the queue; without these numbers, of what the last one left."""
        keys = [*UNACKED, self._room, DEVICES, HEARTBEATS, *priority_lists(queue)[:levels]]
        return Call("queues/take", keys, [self._tags, f', "{queue}", "{queue}"]', *self._claim_args, *most_and_number])

    def _haul(self, queue: str, answer: Sequence[bytes]) -> Haul:
        now, take, *rest = answer
        prefix = f"{self._tags}{take.decode()}."
        taken = [
            Taken(f"{prefix}{n}", rest[at], rest[at + 1].decode(errors="replace"), _claim(*rest[at + 2 : at + 4]))
            for n, at in enumerate(range(0, len(rest), 4))
        ]
        return Haul(queue, float(now), taken)

    def _wait(self, lists: Sequence[tuple[str, str]], longest: float, levels: int) -> list[Haul]:
        for name in self._blocked.keys() - {name for name, _ in lists}:  # of a class that the worker has left
            self._leave(name)
        for name, queue in lists:
            if name not in self._blocked:
                self._blocked[name] = self._block(name, queue, levels)
        hauls = self._woken(dict(lists), longest)
        if not hauls and self._connections.call("GETDEL", self._room) == _USED:
            hauls += self._woken(dict(lists), ANSWER)  # it was taken just now
        return hauls

    def _block(self, name: str, queue: str, levels: int) -> Connection:
        """A connection that waits for a message in the list, and then takes from the queue."""
        connection = self._free.pop() if self._free else Connection(self._url)
        connection.send([("BLMOVE", name, name, "RIGHT", "RIGHT", 0), self._take_call(queue, levels).command])
        return connection

    def _woken(self, queue_of: Mapping[str, str], longest: float) -> list[Haul]:
        """What the connections have taken that a message wakes within `longest` seconds."""
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        listening = {connection.fileno(): name for name, connection in self._blocked.items()}
        for descriptor in listening:
            poller.register(descriptor, select.POLLIN)
        woken = [listening[descriptor] for descriptor, _ in poller.poll(longest * 1000) if descriptor in listening]
        hauls = [self._haul(queue_of[name], answer) for name in woken if (answer := self._answer(name))]
        return [haul for haul in hauls if haul.taken]

    def _answer(self, name: str) -> list[bytes]:
        """What the script said behind the message that woke the connection."""
        connection = self._blocked.pop(name)
        moved, answer = connection.read(2)
        self._free.append(connection)
        checked([moved])
        if isinstance(answer, ServerError) and is_unknown_script(answer):
            return []  # the server was started anew: the next take gives it the script
        taken: list[bytes] = checked([answer])[0]
        return taken

    def _leave(self, name: str) -> None:
        connection = self._blocked.pop(name)
        connection.close()
        self._free.append(connection)

    def _run(self, call: Call) -> Any:
        with fleet_errors("broker"):
            return self._connections.run(call)


def _claim(verdict: bytes, value: bytes) -> Claim | None:
    return claim_from(verdict, value) if verdict else None
