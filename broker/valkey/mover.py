"""Moves on Valkey or Redis: one script, so that a message is in exactly one queue whenever anybody looks."""

from __future__ import annotations

from collections.abc import Sequence

from broker.port import Head, Peeked, Shown, Step
from broker.valkey.moving import MoveRecords, move_call, peek_call
from broker.valkey.queues import addressed
from taxiway.contract.keys import priority_lists
from taxiway.contract.wire import decode_envelope, encode_envelope
from taxiway.errors import InvalidRequestError
from taxiway.valkey.aio import Connection
from taxiway.valkey.errors import fleet_errors


class ValkeyQueueMover(MoveRecords):
    """Class queues on Valkey. Where `state` is another server, records change there first."""

    def __init__(self, *, broker: str, state: str) -> None:
        self._connection = Connection(broker)
        super().__init__(state)
        self._apart = state != broker

    async def head(self, queue: str) -> Head:
        """See `QueueMover`."""
        with fleet_errors("broker"):
            looks = (look for name in priority_lists(queue) for look in (("LLEN", name), ("LINDEX", name, -1)))
            answer = await self._connection.calls(*looks)
        first = [_peeked(queue, level, raw) for level, raw in enumerate(answer[1::2]) if raw is not None]
        return Head(tuple(answer[::2]), tuple(one.job for one in first if one is not None))

    async def peek(self, queue: str, most: int) -> Shown:
        """See `QueueMover`; a message that cannot be read is left out."""
        with fleet_errors("broker"):
            depth, *shown = await self._connection.run(peek_call(queue, most))
        seen = (_peeked(queue, level, raw) for level, raws in enumerate(shown) for raw in raws)
        return Shown(depth, [peeked for peeked in seen if peeked is not None])

    async def move(self, token: str, steps: Sequence[Step]) -> list[bool]:
        """See `QueueMover`."""
        if self._apart and not await self.record(token, steps):
            return [False] * len(steps)
        messages = [encode_envelope(addressed(step.envelope, step.queue, step.peeked.level)) for step in steps]
        call = move_call("" if self._apart else token, steps, messages, record=not self._apart)
        with fleet_errors("broker"):
            moved = await self._connection.run(call)
        return [bool(one) for one in moved] or [False] * len(steps)

    async def put_back(self) -> None:
        """Nothing: what was shown never left its queue."""

    async def close(self) -> None:
        """See `QueueMover`."""
        await super().close()
        self._connection.close()


def _peeked(queue: str, level: int, raw: bytes) -> Peeked | None:
    try:
        return Peeked(queue, level, raw, decode_envelope(raw))
    except InvalidRequestError:
        return None
