"""Job arrays: many inputs as one submission, by both clients and the command line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tasks.settings import Settings
from taxiway import (
    AsyncClient,
    Client,
    ExecutionError,
    InvalidRequestError,
    JobCancelledError,
    Result,
    TaxiwayError,
    UnknownModelError,
    UnknownObjectError,
)
from taxiway.client.arrays import ArrayProgress
from tests.command_line import CommandLine
from tests.routing import eventually, router_process
from tests.working import LASTING, QUEUES, release, worker_process, worker_settings

MEMBERS = 300  # more than a router runs at the same time


@pytest.fixture(scope="module")
def fleet(lasting: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    fleet = worker_settings(lasting, tmp_path_factory.mktemp("arrays"), QUEUES.replace("max_batch: 16", "max_batch: 1"))
    with worker_process(fleet):
        yield fleet


@pytest.fixture(scope="module")
def url(fleet: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with router_process(fleet, options=["--files", str(tmp_path_factory.mktemp("files"))]) as router:
        yield router.http


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def one(samples: Any, seed: Any = 1) -> dict[str, Any]:
    return {"samples": samples, "seed": seed}


def estimates(outcomes: list[Result | TaxiwayError]) -> list[Any]:
    return [one.outputs["estimate"] if isinstance(one, Result) else type(one) for one in outcomes]


def test_members_are_answered_in_the_order_of_the_inputs_and_failures_are_values(client: Client) -> None:
    seen: list[ArrayProgress] = []
    array = client.array("slab", (one(number % 100, number) for number in range(MEMBERS)))
    outcomes = array.results(timeout=120, watch=seen.append)

    expected = [number / (number % 100) if number % 100 else ExecutionError for number in range(MEMBERS)]
    assert estimates(outcomes) == expected
    assert (seen[-1].state, seen[-1].completed, seen[-1].failed) == ("completed", MEMBERS - 3, 3)
    again = array.retry()
    assert estimates(again.results(timeout=120)) == [ExecutionError] * 3
    assert again.progress().members == 3


def test_answers_come_while_other_members_run(client: Client, fleet: Settings) -> None:
    array = client.array("slab", [one(2), one(0), one(LASTING["samples"][0]), one(4)])
    outcomes = iter(array)
    assert estimates([next(outcomes), next(outcomes)]) == [0.5, ExecutionError]
    assert array.progress().state == "in_progress"
    release(fleet)
    rest = [*outcomes]
    (fleet.models.parent / "over").unlink()
    assert estimates(rest)[1:] == [0.25]
    assert estimates(array.results()) == [0.5, ExecutionError, *estimates(rest)]


async def test_inputs_may_be_arrays_rows_and_bytes(url: str) -> None:
    async with AsyncClient(url, arrays=True) as client:
        rows = [one(np.array([2, 4]), np.array([1, 1])), one([2, 4], [2, 2]), one([2], [3])]
        numbers = await (await client.array("slab", rows)).results(timeout=60)
        texts = await (await client.array("echo", ["a", b"\xff", ["b", "c"]])).results(timeout=60)
    found = [[one.outputs for one in outcomes if isinstance(one, Result)] for outcomes in (numbers, texts)]
    assert [list(outputs["estimate"]) for outputs in found[0]] == [[0.5, 0.25], [1.0, 0.5], [1.5]]
    assert [next(iter(outputs.values())) for outputs in found[1]] == ["a", b"\xff", ["b", "c"]]


async def test_an_array_that_is_gone_is_not_known(url: str) -> None:
    async with AsyncClient(url) as client:
        array = await client.array("slab", [one(1)])
        array.id = "batch_gone"
        with pytest.raises(UnknownObjectError):
            await array.progress()


def test_what_is_cancelled_says_so(client: Client, fleet: Settings) -> None:
    array = client.array("slab", [one(1), *[one(LASTING["samples"][0])] * 3], within="1h")
    eventually(lambda: array.progress().state == "in_progress")
    array.cancel()
    outcomes = array.results(timeout=60)
    release(fleet)

    assert array.progress().state == "cancelled"
    assert estimates(outcomes)[-1] is JobCancelledError


def test_terms_apply_to_all_members_and_wrong_ones_are_refused(client: Client, fleet: Settings) -> None:
    assert estimates(client.array("slab", [one(1)], tenant="default", priority="high").results(timeout=60)) == [1.0]
    with pytest.raises(InvalidRequestError, match="deadline: expected none for an array"):
        client.array("slab", [one(1)], deadline=5.0)
    with pytest.raises(InvalidRequestError, match="inputs: expected at least one"):
        client.array("slab", [])
    with pytest.raises(UnknownModelError):
        client.array("slib", [one(1)])
    with pytest.raises(
        InvalidRequestError, match=r"array: input 2: inputs.samples: expected INT64.*; 1 more are wrong"
    ):
        client.array("slab", [one(1), one("many"), one("few")]).results(timeout=60)
    with Client(fleet.broker) as broker, pytest.raises(InvalidRequestError, match="array: expected an http://"):
        broker.array("slab", [one(1)])


def test_the_command_line_prints_a_line_for_each_line(url: str, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"samples": 2, "seed": 1}\n\n{"samples": 0, "seed": 1}\n')
    taxiway = CommandLine()
    done = taxiway("array", "slab", str(lines), "--url", url)
    assert done.exit_code == 1, done.stderr
    printed = [msgspec.json.decode(line) for line in done.stdout.splitlines()]
    assert (printed[0]["outputs"], printed[1]["code"]) == ({"estimate": 0.5}, "execution_failed")
    name = taxiway.succeed("array", "slab", "-", "--no-wait", "--url", url, input='{"samples": 2, "seed": 1}').stdout
    assert name.startswith("batch_")
