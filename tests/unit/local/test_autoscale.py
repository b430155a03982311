import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local.autoscaler import Autoscaler, WorkerBounds, most_workers, resize
from local.plan import WorkerPlan
from local.supervisor import SupervisedProcess
from tasks.machine import Machine
from tasks.topology import parse_topology

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
CLASSES = st.sampled_from("abcd")
COUNTS = st.dictionaries(CLASSES, st.integers(0, 9))


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


@given(COUNTS, COUNTS, st.sets(CLASSES), st.integers(1, 8))
def test_classes_get_at_most_what_they_may(
    want: Mapping[str, int], most: Mapping[str, int], on_cpu: set[str], cores: int
) -> None:
    counts = resize(want, most, on_cpu=on_cpu, cores=cores)
    assert counts.keys() == want.keys()
    for name, count in counts.items():
        allowed = min(want[name], most.get(name, 0))
        assert min(allowed, 1) <= count <= allowed
        assert name in on_cpu or count == allowed
    sharing = [count for name, count in counts.items() if name in on_cpu and count]
    assert sum(sharing) <= max(cores, len(sharing))


@pytest.mark.parametrize(("begun", "want", "last"), [(3, 1, 1), (2, None, 2)])
def test_the_last_workers_go_first_and_none_without_a_need(
    tmp_path: Path, begun: int, want: int | None, last: int
) -> None:
    workers = slots(tmp_path, 3)
    scaler = Autoscaler(workers, WorkerBounds({"cpu": begun}, 4), lambda name: want)
    assert wanted(workers) == [n < begun for n in range(3)]
    scaler.tend()
    assert wanted(workers) == [n < last for n in range(3)]
