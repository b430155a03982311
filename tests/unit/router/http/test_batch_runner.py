"""Which batches a router takes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from router.http.openai.batch_runner import BatchRunner
from taxiway.errors import BrokerUnavailableError, TaxiwayError, UnknownObjectError


class OneOpenBatch:
    """Objects whose only batch cannot be read, for this reason."""

    def __init__(self, reason: TaxiwayError) -> None:
        self.open = [("batch_1", "lab")]
        self._reason = reason

    async def open_batches(self) -> list[tuple[str, str]]:
        return self.open

    async def get(self, *_: Any) -> bytes:
        raise self._reason

    async def close_batch(self, name: str, tenant: str, ended: float) -> None:
        self.open.remove((name, tenant))


@pytest.mark.parametrize(
    ("reason", "left"),
    [
        pytest.param(BrokerUnavailableError("the state store does not answer"), 1, id="unavailable"),
        pytest.param(UnknownObjectError("no batch 'batch_1' is known"), 0, id="deleted"),
    ],
)
def test_a_batch_that_cannot_be_read_stays_open_unless_it_was_deleted(reason: TaxiwayError, left: int) -> None:
    objects = OneOpenBatch(reason)

    async def looked() -> None:
        unused = cast(Any, None)
        runner = BatchRunner(
            cast(Any, SimpleNamespace(leaving=False, store=SimpleNamespace(now=lambda: 1.0))),
            unused,
            cast(Any, objects),
            unused,
        )
        await runner._look()
        await asyncio.gather(*runner._tasks.values())

    asyncio.run(looked())
    assert len(objects.open) == left
