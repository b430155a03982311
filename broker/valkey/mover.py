"""The moves of waiting messages, which only the leader makes.

One script makes a move, so that a message is always in exactly one queue. `MoveRecords` is what the state store keeps
of moves, whatever the broker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from broker.port import PEEK_BYTES, Head, Inspected, Moved, Peeked, Step
from broker.valkey import Call
from broker.valkey.forwarding import addressed
from taxiway.connection import AsyncConnection
from taxiway.contract.keys import LEAD, MOVES, WORK, job_key, priority_list, priority_lists
from taxiway.contract.wire import decode_envelope, encode_envelope
from taxiway.errors import InvalidRequestError

MOVES_KEPT = 50
"""Number of recent moves that are kept for operators."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Moved).decode


def peek_call(queue: str, most: int) -> Call:
    """Reads up to `most` messages of each level of a queue, those served last, and the total number of messages."""
    return Call("queues/peek", priority_lists(queue), [most, PEEK_BYTES])


def move_call(token: str, steps: Sequence[Step], messages: Sequence[bytes], *, record: bool) -> Call:
    """Moves messages, and records it; `messages` are the new ones as the broker keeps them, handles the old ones."""
    keys, args = [LEAD, WORK], list[Any]([token])
    for step, message in zip(steps, messages, strict=True):
        peeked = step.peeked
        keys += (priority_list(peeked.queue, peeked.level), priority_list(step.queue, peeked.level))
        keys.append(job_key(peeked.job))
        args += (peeked.handle, message, *(_fields(step) if record else (0,)))
    return Call("queues/move", keys, args)


def record_call(token: str, steps: Sequence[Step]) -> Call:
    """Records moves that another server makes; answers 0 if the lead was lost."""
    keys = [LEAD, WORK, *(job_key(step.peeked.job) for step in steps)]
    return Call("queues/record_moves", keys, [token, *(part for step in steps for part in _fields(step))])


def _fields(step: Step) -> tuple[Any, ...]:
    return len(step.fields) * 2, *(text for pair in step.fields.items() for text in pair)


class MoveRecords:
    """The part of a queue mover in the state store, the same for every broker."""

    def __init__(self, url: str) -> None:
        self._store = AsyncConnection(url, server="state store")

    async def records(self, jobs: Sequence[str], names: Sequence[str]) -> list[dict[str, str]]:
        """See `QueueMover.records`."""
        found = await self._store.calls(*(("HMGET", job_key(job), *names) for job in jobs))
        return [
            {name: value.decode() for name, value in zip(names, values, strict=True) if value is not None}
            for values in found
        ]

    async def record(self, token: str, steps: Sequence[Step]) -> bool:
        """Record moves that another server makes; False if the lead was lost."""
        return bool(await self._store.run(record_call(token, steps)))

    async def note_moves(self, moved: Sequence[Moved]) -> None:
        """See `QueueMover.note_moves`."""
        await self._store.calls(("LPUSH", MOVES, *map(_encode, moved)), ("LTRIM", MOVES, 0, MOVES_KEPT - 1))

    async def moves(self) -> list[Moved]:
        """See `QueueMover.moves`."""
        kept = await self._store.call("LRANGE", MOVES, 0, MOVES_KEPT - 1)
        return [_decode(raw) for raw in kept]

    async def close(self) -> None:
        """Disconnect."""
        self._store.close()


class ValkeyQueueMover(MoveRecords):
    """Class queues on Valkey. If `state` is another server, records change there first."""

    def __init__(self, *, broker: str, state: str) -> None:
        self._connection = AsyncConnection(broker, server="broker")
        super().__init__(state)
        self._apart = state != broker

    async def head(self, queue: str) -> Head:
        """See `QueueMover`."""
        looks = (look for name in priority_lists(queue) for look in (("LLEN", name), ("LINDEX", name, -1)))
        answer = await self._connection.calls(*looks)
        first = [_peeked(queue, level, raw) for level, raw in enumerate(answer[1::2]) if raw is not None]
        return Head(tuple(answer[::2]), tuple(one.job for one in first if one is not None))

    async def peek(self, queue: str, most: int) -> Inspected:
        """See `QueueMover`; a message that cannot be read is left out."""
        depth, *inspected = await self._connection.run(peek_call(queue, most))
        seen = (_peeked(queue, level, raw) for level, raws in enumerate(inspected) for raw in raws)
        return Inspected(depth, [peeked for peeked in seen if peeked is not None])

    async def move(self, token: str, steps: Sequence[Step]) -> list[bool]:
        """See `QueueMover`."""
        if self._apart and not await self.record(token, steps):
            return [False] * len(steps)
        messages = [encode_envelope(addressed(step.envelope, step.queue, step.peeked.level)) for step in steps]
        call = move_call("" if self._apart else token, steps, messages, record=not self._apart)
        moved = await self._connection.run(call)
        return [bool(one) for one in moved] or [False] * len(steps)

    async def put_back(self) -> None:
        """Nothing: inspected messages never left their queue."""

    async def close(self) -> None:
        """See `QueueMover`."""
        await super().close()
        self._connection.close()


def _peeked(queue: str, level: int, raw: bytes) -> Peeked | None:
    try:
        return Peeked(queue, level, raw, decode_envelope(raw))
    except InvalidRequestError:
        return None
