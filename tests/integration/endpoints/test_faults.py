"""Each fault of an engine a few times under load, before a router: `python -m benchmarks.engines --faults` has more."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.settings import TREE, Settings
from tests.engine_faults import CLASSES, OF_PROMPTS, OF_SERVERS, FaultyEngine, table
from tests.routing import RouterProcess, eventually, router_process
from tests.serving import is_ready
from tests.working import worker_process, worker_settings

pytestmark = pytest.mark.slow

COUNT = 3


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyEngine]:
    yield FaultyEngine(tmp_path)
    gc.collect()  # sockets whose TLS handshake a stopping server cut off: only their collection closes them


@pytest.fixture
def router(settings: Settings, tmp_path: Path, faulty: FaultyEngine) -> Iterator[RouterProcess]:
    with faulty.serving() as queues:
        configured = worker_settings(settings, tmp_path, queues)
        (configured.models / "chat").symlink_to(TREE / "models" / "chat")
        with (
            worker_process(configured, "--class", CLASSES[0]),
            worker_process(configured, "--class", CLASSES[1]),
            router_process(configured) as router,
        ):
            eventually(lambda: is_ready(router, "chat"))
            yield router


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_no_fault_loses_a_job_or_is_silent_and_only_an_unknown_fate_is_sent_again(
    router: RouterProcess, faulty: FaultyEngine
) -> None:
    tallies = [tally async for tally in table(router.http, faulty, COUNT)]
    assert [tally.fault for tally in tallies] == [*OF_PROMPTS, *OF_SERVERS]
    assert all(tally.jobs for tally in tallies)
    assert [(tally.fault, tally.lost, tally.silent) for tally in tallies if tally.lost or tally.silent] == []
    for tally in tallies[: len(OF_PROMPTS)]:
        assert (tally.errors, tally.again <= tally.faults) == ({}, True), tally
    for tally in tallies[len(OF_PROMPTS) :]:  # a job whose connection broke three times has had its attempts
        assert tally.errors.keys() <= {"DeviceFaultError"}, tally
    assert tallies[-1].again == 0  # other models: nothing was sent that could not run
