"""The moves of waiting messages, which only the leader makes.

One script makes the moves, so that a message is always in exactly one queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from broker.port import PEEK_BYTES, Moved, MoveStep, Peeked, QueueHead
from broker.valkey import Call, as_text, flat, packed
from broker.valkey.forwarding import addressed
from taxiway.connection import AsyncConnection
from taxiway.contract.keys import LEAD, MOVES, UNACKED, WORK, job_key, priority_list, priority_lists
from taxiway.contract.wire import decode_envelope, encode_envelope
from taxiway.errors import InvalidRequestError

MOVES_KEPT = 50
"""Number of recent moves that are kept for operators."""

HELD_BYTES = 64 * 2**10
"""Bytes of a message that is read while its job runs; one with a larger message does not move then."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Moved).decode


def move_call(token: str, steps: Sequence[MoveStep], messages: Sequence[bytes]) -> Call:
    """Moves messages, and records it; `messages` are the new ones as the broker keeps them."""
    keys, args = [LEAD, WORK], list[Any]([token])
    for step, message in zip(steps, messages, strict=True):
        peeked = step.peeked
        keys += (priority_list(peeked.queue, peeked.level), priority_list(step.queue, peeked.level))
        keys.append(job_key(peeked.job))
        args.append(packed({"message": as_text(peeked.raw), "moved": as_text(message), "record": flat(step.fields)}))
    return Call("queues/move", keys, args)


class ValkeyQueueMover:
    """Class queues, for moving what waits in them. Methods raise `BrokerUnavailableError` while it does not answer."""

    def __init__(self, url: str) -> None:
        self._connection = AsyncConnection(url, server="state store")

    async def head(self, queue: str) -> QueueHead:
        """What waits in the queue."""
        looks = (look for name in priority_lists(queue) for look in (("LLEN", name), ("LINDEX", name, -1)))
        answer = await self._connection.calls(*looks)
        first = [_peeked(queue, level, raw) for level, raw in enumerate(answer[1::2]) if raw is not None]
        return QueueHead(tuple(answer[::2]), tuple(one.job for one in first if one is not None))

    async def peek(self, queue: str, most: int) -> tuple[int, list[Peeked]]:
        """The number of messages in the queue, and up to `most` per level: those served last, in reverse serving order.

        They stay in the queue. A message that cannot be read is left out.
        """
        depth, *inspected = await self._connection.run(Call("queues/peek", priority_lists(queue), [most, PEEK_BYTES]))
        seen = (_peeked(queue, level, raw) for level, raws in enumerate(inspected) for raw in raws)
        return depth, [peeked for peeked in seen if peeked is not None]

    async def held(self, queue: str, tags: Sequence[tuple[str, int]]) -> list[Peeked | None]:
        """The messages that workers hold under these tags, each with its level; None where it is gone or too large."""
        sizes = await self._connection.calls(*(("HSTRLEN", UNACKED[0], tag) for tag, _ in tags))
        asked = [
            ("HGET", UNACKED[0], tag if size <= HELD_BYTES else "") for (tag, _), size in zip(tags, sizes, strict=True)
        ]
        entries = await self._connection.calls(*asked)
        messages = [None if entry is None else entry[1:].rsplit(b', "', 2)[0] for entry in entries]
        return [
            None if raw is None else _peeked(queue, level, raw) for raw, (_, level) in zip(messages, tags, strict=True)
        ]

    async def records(self, jobs: Sequence[str], names: Sequence[str]) -> list[dict[str, str]]:
        """The named fields of each job's record, in order; fields that a record lacks are omitted."""
        found = await self._connection.calls(*(("HMGET", job_key(job), *names) for job in jobs))
        return [
            {name: value.decode() for name, value in zip(names, values, strict=True) if value is not None}
            for values in found
        ]

    async def move(self, token: str, steps: Sequence[MoveStep]) -> list[bool]:
        """Move messages; returns which moved. The others have been taken, or this router no longer leads."""
        messages = [encode_envelope(addressed(step.envelope, step.queue, step.peeked.level)) for step in steps]
        moved = await self._connection.run(move_call(token, steps, messages))
        return [bool(one) for one in moved] or [False] * len(steps)

    async def note_moves(self, moved: Sequence[Moved]) -> None:
        """Record moves for operators."""
        await self._connection.calls(("LPUSH", MOVES, *map(_encode, moved)), ("LTRIM", MOVES, 0, MOVES_KEPT - 1))

    async def moves(self) -> list[Moved]:
        """The fleet's last moves, most recent first."""
        kept = await self._connection.call("LRANGE", MOVES, 0, MOVES_KEPT - 1)
        return [_decode(raw) for raw in kept]

    async def close(self) -> None:
        """Disconnect."""
        self._connection.close()


def _peeked(queue: str, level: int, raw: bytes) -> Peeked | None:
    try:
        return Peeked(queue, level, raw, decode_envelope(raw))
    except InvalidRequestError:
        return None
