import os
from pathlib import Path

import pytest

from local.autoscaler import Autoscaler, Replanner, WorkerBounds, most_workers, resize
from local.plan import WorkerPlan, plan_fleet
from local.supervisor import SupervisedProcess
from tasks.machine import Machine
from tasks.queues.queues_file import QueuesFile
from tasks.topology import parse_topology
from tests.builders import recorded

TOPOLOGY = parse_topology("""
hardware:
  cpu: &cpu {device: cpu, runtimes: [echo], max_batch: 4, max_wait: 0, price: {usd_per_hour: 1}}
  bounded: {<<: *cpu, scaling: {maximum: 1}}
  gpu: {<<: *cpu, device: cuda}
service: {standard: {deadline: 5}}
default_service: standard
""")
MACHINE = Machine(
    cores=4, memory=2**34, memory_free=2**33, instruction_sets=(), cuda=("L4",), tpu_chips=0, runtimes={"torch": "2"}
)


def slots(folder: Path, count: int, hardware_class: str = "cpu") -> list[tuple[WorkerPlan, SupervisedProcess]]:
    plans = [WorkerPlan(hardware_class, f"cpu:{n}", False) for n in range(count)]
    return [(plan, SupervisedProcess(plan.name, [], dict(os.environ), folder, announces=True)) for plan in plans]


def wanted(workers: list[tuple[WorkerPlan, SupervisedProcess]]) -> list[bool]:
    return [process.wanted for _, process in workers]


def test_a_class_may_have_a_worker_a_core_or_device_unless_it_is_bounded() -> None:
    assert most_workers(TOPOLOGY, MACHINE, emulate=(), counts={}) == {"cpu": 4, "bounded": 1, "gpu": 1}
    assert most_workers(TOPOLOGY, MACHINE, emulate=("gpu",), counts={"cpu": 2}) == {"cpu": 2, "bounded": 1, "gpu": 4}


@pytest.mark.cases("want, cores, counts")
def test_classes_on_the_cpu_share_its_cores(want: dict[str, int], cores: int, counts: dict[str, int]) -> None:
    assert resize(want, dict.fromkeys(want, 9), on_cpu={"a", "b", "c"}, cores=cores) == counts


@pytest.mark.parametrize(("begun", "want", "last"), [(3, 1, 1), (2, None, 2)])
def test_the_last_workers_go_first_and_none_without_a_need(
    tmp_path: Path, begun: int, want: int | None, last: int
) -> None:
    workers = slots(tmp_path, 3)
    scaler = Autoscaler(workers, WorkerBounds({"cpu": begun}, 4), lambda name: want)
    assert wanted(workers) == [n < begun for n in range(3)]
    scaler.tend()
    assert wanted(workers) == [n < last for n in range(3)]


ENGINES = recorded("documents/engines.yaml")
NEW = """\
  more: {device: cpu, runtimes: [onnx], concurrency: 2, max_batch: 4, max_wait: 0, price: {usd_per_hour: 1}}
service:"""


def replanned(
    folder: Path, patch: pytest.MonkeyPatch, *, scaled: bool = False
) -> tuple[Path, list[tuple[WorkerPlan, SupervisedProcess]], Replanner]:
    """A queues.yaml with one endpoint, its worker, and what follows the file at each look."""
    patch.setattr("local.autoscaler.EVERY", 0.0)
    path = folder / "queues.yaml"
    path.write_text(ENGINES.format(urls='"http://a"'))

    def made(plan: WorkerPlan) -> SupervisedProcess:
        return SupervisedProcess(plan.name, [], dict(os.environ), folder, announces=True)

    first = WorkerPlan("engine", "endpoint:0", False)
    workers = [(first, made(first))]
    follows = Replanner(QueuesFile(path), lambda topology: plan_fleet(topology, MACHINE), workers, made, scaled=scaled)
    return path, workers, follows


def test_each_replica_has_a_worker_as_queues_yaml_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, workers, replicas = replanned(tmp_path, monkeypatch)
    workers += slots(tmp_path, 1)
    replicas.tend()
    assert len(workers) == 2
    path.write_text(ENGINES.format(urls='"http://a", "http://b", "http://c"'))
    replicas.tend()
    assert [plan.device for plan, _ in workers] == ["endpoint:0", "cpu:0", "endpoint:1", "endpoint:2"]
    assert wanted(workers) == [True] * 4
    path.write_text(ENGINES.format(urls='"http://b"'))
    replicas.tend()
    assert wanted(workers) == [True, True, False, False]
    path.write_text(ENGINES.format(urls='"http://b", "http://a"'))
    replicas.tend()
    assert wanted(workers) == [True, True, True, False]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_new_class_gets_its_workers_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    path, workers, replanner = replanned(tmp_path, monkeypatch, scaled=scaled)
    scaler = Autoscaler(workers, WorkerBounds({"engine": 1}, 4), lambda name: 1 if name == "engine" else 2)
    path.write_text(ENGINES.format(urls='"http://a"').replace("service:", NEW, 1))
    replanner.tend()
    assert [plan.name for plan, _ in workers] == ["engine.endpoint-0", "more.cpu-0", "more.cpu-1"]
    assert wanted(workers) == [True, not scaled, not scaled]
    scaler.tend()
    assert wanted(workers) == [True] * 3
    path.write_text(ENGINES.format(urls='"http://a"'))  # a class that is gone serves until a restart
    replanner.tend()
    assert wanted(workers) == [True] * 3
