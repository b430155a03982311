from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from local.artefacts import for_runtimes, runtimes_of
from local.plan import StartPlanError, WorkerPlan, absent, plan_fleet
from local.supervisor import ended_with, exit_of, exit_reason
from local.torch_choice import brings_cuda
from tasks.machine import Machine
from tasks.queues.endpoints import Endpoint
from tasks.settings import TREE
from tasks.topology import HardwareClass, Price, Topology, load_topology

TOPOLOGY = load_topology(TREE / "queues.yaml")
LAPTOP = Machine(
    cores=4,
    memory=8 * 2**30,
    memory_free=4 * 2**30,
    instruction_sets=("avx2",),
    cuda=(),
    tpu_chips=0,
    runtimes={"onnx": "1.22", "jax": "0.6"},
)
WORKSTATION = replace(LAPTOP, cuda=("L4", "L4"), runtimes={**LAPTOP.runtimes, "torch": "2.7"})


def test_a_laptop_gets_one_cpu_worker_a_core_and_the_reasons_for_no_others() -> None:
    plan = plan_fleet(TOPOLOGY, LAPTOP)
    assert [w.device for w in plan.workers] == ["cpu:0", "cpu:1", "cpu:2", "cpu:3", "endpoint:0"]
    assert plan.left_out == {
        "gpu.realtime": "this machine has no cuda device (--emulate gpu.realtime serves it on the CPU)",
        "tpu.bulk": "this machine has no tpu device (--emulate tpu.bulk serves it on the CPU)",
    }


def test_each_cuda_device_gets_a_worker_of_its_own() -> None:
    workers = plan_fleet(TOPOLOGY, WORKSTATION, counts={"cpu.batch": 0, "cpu.llama": 0}).workers
    assert workers == tuple(WorkerPlan("gpu.realtime", f"cuda:{n}", emulated=False) for n in range(2))
    undriven = plan_fleet(TOPOLOGY, replace(WORKSTATION, runtimes=LAPTOP.runtimes))
    assert "torch, which drives it, is not installed" in undriven.left_out["gpu.realtime"]
    with pytest.raises(StartPlanError, match="at most one worker per device"):
        plan_fleet(TOPOLOGY, WORKSTATION, counts={"gpu.realtime": 3})


def test_an_emulated_class_is_marked_so_on_its_command_line() -> None:
    plan = plan_fleet(TOPOLOGY, LAPTOP, emulate=["gpu.realtime", "tpu.bulk"], counts={"cpu.batch": 1, "cpu.llama": 0})
    assert [w.name for w in plan.workers] == ["cpu.batch.cpu-0", "gpu.realtime.cuda-0", "tpu.bulk.tpu-0"]
    assert ["--emulate" in w.command() for w in plan.workers] == [False, True, True]
    assert not plan.left_out


def with_endpoint() -> Topology:
    """The shipped classes, and one of an endpoint with two replicas."""
    endpoint = Endpoint(protocol="openai", url=("http://a/v1", "http://b/v1"), slots=4, models={"chat": "m"})
    engine = HardwareClass(device="endpoint", endpoint=endpoint, price=Price(usd_per_hour=1))
    return msgspec.structs.replace(TOPOLOGY, hardware={**TOPOLOGY.hardware, "engine": engine})


def test_each_replica_of_an_endpoint_gets_a_worker_wherever_it_is_driven_from() -> None:
    workers = plan_fleet(with_endpoint(), LAPTOP, counts={"cpu.batch": 0, "cpu.llama": 0}).workers
    assert [(w.device, w.computes_on_cpu) for w in workers] == [("endpoint:0", False), ("endpoint:1", False)]
    assert absent(with_endpoint(), LAPTOP) == ("gpu.realtime", "tpu.bulk")
    assert absent(TOPOLOGY, WORKSTATION) == ("tpu.bulk",)
    with pytest.raises(StartPlanError, match="engine runs on its endpoint: there is nothing to emulate"):
        plan_fleet(with_endpoint(), LAPTOP, emulate=["engine"])


@pytest.mark.cases("asked, expected")
def test_a_plan_that_makes_no_sense_is_refused(asked: dict[str, object], expected: str) -> None:
    with pytest.raises(StartPlanError, match=expected):
        plan_fleet(TOPOLOGY, LAPTOP, **asked)  # type: ignore[arg-type]  # one of two keywords


@pytest.mark.cases("status, reason")
def test_an_exit_status_is_shown_in_words(status: int, reason: str) -> None:
    assert exit_reason(status) == reason


def test_the_last_line_of_a_log_is_shown_in_words(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text(
        '{"time": "…", "event": "loaded"}\n'
        '{"event": "worker thread failed", "error": "Traceback …:\\n  File …\\nValueError: no such key"}\n'
        '{"ready": "worker", "worker": "cpu.batch.cpu-0@host"}\n'
    )
    assert exit_of(70, log).last_line == "worker thread failed: ValueError: no such key"
    log.write_text("Illegal instruction\n\n")
    assert exit_of(-4, log).last_line == "Illegal instruction"


def test_only_runtimes_that_some_started_class_uses_are_fetched_for() -> None:
    assert runtimes_of(TOPOLOGY, ["tpu.bulk"], {"onnx", "jax", "torch"}) == {"jax"}
    assert for_runtimes([], ["onnx"]) == []


@pytest.mark.cases("version, requirements, expected")
def test_torch_is_known_to_bring_cuda_by_its_version_and_requirements(
    version: str, requirements: list[str], expected: bool
) -> None:
    assert brings_cuda(version, requirements) is expected


@pytest.mark.cases("said, status, expected")
def test_why_a_detached_fleet_failed_is_said_with_its_code(
    said: str, status: int, expected: tuple[str, str, int]
) -> None:
    error = ended_with(said, status)
    assert (str(error), error.hint, error.code) == tuple(expected)
