"""What the one that moves keeps in the state store: the records of what it moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from broker.mover import Moved, Step
from broker.valkey.connection import connect, run, told_plainly
from broker.valkey.moving import record_call
from taxiway.contract.keys import MOVES, job_key

MOVES_KEPT = 50
"""Moves that are remembered for whoever looks at the fleet."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Moved).decode


class StateYard:
    """What every yard keeps there, whatever its broker."""

    def __init__(self, url: str) -> None:
        self._store = connect(url)

    async def records(self, jobs: Sequence[str], names: Sequence[str]) -> list[dict[str, str]]:
        """See `Yard.records`."""
        with told_plainly("state store"):
            async with self._store.pipeline(transaction=False) as pipeline:
                for job in jobs:
                    pipeline.hmget(job_key(job), list(names))
                found = await pipeline.execute()
        return [
            {name: value.decode() for name, value in zip(names, values, strict=True) if value is not None}
            for values in found
        ]

    async def record(self, token: str, steps: Sequence[Step]) -> bool:
        """Record moves that another server makes; False where the lead was lost."""
        with told_plainly("state store"):
            return bool(await run(self._store, record_call(token, steps)))

    async def tell(self, moved: Sequence[Moved]) -> None:
        """See `Yard.tell`."""
        with told_plainly("state store"):
            async with self._store.pipeline(transaction=False) as pipeline:
                pipeline.lpush(MOVES, *map(_encode, moved))
                pipeline.ltrim(MOVES, 0, MOVES_KEPT - 1)
                await pipeline.execute()

    async def moves(self) -> list[Moved]:
        """See `Yard.moves`."""
        with told_plainly("state store"):
            told: list[Any] = await self._store.lrange(MOVES, 0, MOVES_KEPT - 1)
        return [_decode(raw) for raw in told]

    async def close(self) -> None:
        """Disconnect."""
        await self._store.aclose()
