"""Which batches a router takes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from api.access import Bodies
from api.objects.batch_runner import BatchRunner, Desk
from api.objects.batch_turns import LineWindow
from tasks.document import Size
from tasks.settings import TREE
from tasks.topology import Limits, parse_topology
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, TaxiwayError, UnknownObjectError


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
        router = SimpleNamespace(leaving=False, store=SimpleNamespace(clock=SimpleNamespace(now=lambda: 1.0)))
        runner = BatchRunner(Desk(cast(Any, router), unused, cast(Any, objects), unused, unused, LineWindow(1)))
        with suppress(BrokerUnavailableError):
            await runner._look()
        await asyncio.gather(*runner._tasks.values())

    asyncio.run(looked())
    assert len(objects.open) == left


def test_a_running_line_counts_as_a_body_of_its_tenant_and_its_answer_until_it_is_written() -> None:
    unused = cast(Any, None)
    limits = Limits(payload=Size(100), bodies=Size(250), all_bodies=Size(400))
    bodies = Bodies(msgspec.structs.replace(parse_topology((TREE / "queues.yaml").read_text()), limits=limits))
    lines = LineWindow(1000)
    desk = Desk(unused, unused, unused, unused, bodies, lines)
    assert [desk.begins("lab", 100, 10) for _ in range(3)] == [True, True, False]
    assert [desk.begins("shop", 100, 10) for _ in range(3)] == [True, True, False]
    with pytest.raises(FleetUnavailable, match="all_bodies"):
        bodies.take("press", 1)
    desk.ended("lab", 100, 10, 889)
    bodies.take("press", 1)
    assert not desk.begins("lab", 1, 1)
    lines.add("lab", -889)
    assert not desk.begins("lab", 1, 890)
    assert desk.begins("lab", 1, 889)
