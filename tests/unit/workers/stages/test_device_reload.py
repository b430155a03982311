"""Devices as they are found, and what their thread runs, at which priority, how many batches it takes and loads."""

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import yaml

from tasks.machine import look
from tasks.models.folder import ModelsFolder
from tasks.models.profiles import ProfileBook
from tasks.queues.queues_file import QueuesFile
from tasks.settings import TREE, SettingsError
from tasks.topology import HardwareClass, load_topology
from taxiway.contract.keys import LEVELS, PATIENT
from tests.builders import a_class, a_ticket, a_topology
from tests.celery_double import Admissions, Endings, NoCelery
from tests.graphs import SCALE_SPECS, scale_graph, write_model
from tests.unit.workers.parts import a_delivery, a_running_job, an_executor, shared
from tests.waiting import in_thread, until
from workers.device import USD_PER_HOUR, DeviceMissingError, find_device, memory_free, options_from, utilisation
from workers.executor import NOTICED, Executor
from workers.port import Item
from workers.profiling.measure import bench_class
from workers.stages.admit import gather, prepare
from workers.stages.device import OTHERS_FIRST, DeviceStage
from workers.stages.job import Ending, RunningJob
from workers.stages.lane import Lane
from workers.stages.queues import DeviceQueue, patient_seconds


class Gate(NoCelery):
    """Lets a batch wait before it runs."""

    def __init__(self, begun: threading.Event, gate: threading.Event) -> None:
        super().__init__()
        self._begun, self._gate = begun, gate

    def is_revoked(self, job: str) -> bool:
        self._begun.set()
        assert self._gate.wait(20)
        return False


class Device:
    """A device stage over the models `one` and `other`; a batch waits at `gate` before it runs."""

    def __init__(self, root: Path) -> None:
        for name in ("one", "other"):
            write_model(root / "models", name, scale_graph(2.0), **SCALE_SPECS)
        self.root = root / "models"
        self.folder = ModelsFolder(self.root, QueuesFile(TREE / "queues.yaml"))
        self.executor = an_executor(root / "cache", a_class(runtimes=("onnx",)))
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.jobs = DeviceQueue()
        self.endings, self.admissions = Endings(), Admissions()
        parts = shared(self.admissions, celery=Gate(self.begun, self.gate))
        self.stage = DeviceStage(self.jobs, self.endings.put, self.executor, parts)

    def job(self, name: str) -> RunningJob:
        """A job of the model as the folder has it now."""
        model = self.folder.catalogue.resolve(name)
        delivery = a_delivery(a_ticket(name, model.id))
        return a_running_job(model, delivery=delivery, rows=({"x": [1.0, 2.0]},), outputs=("y",))

    def edit(self, name: str, factor: float = 2.0, **fields: Any) -> None:
        """Change a model in the folder, and tell the stage."""
        write_model(self.root, name, scale_graph(factor), **{**SCALE_SPECS, **fields})
        self.renew()

    def renew(self) -> None:
        """Read the folder, and tell the stage."""
        assert self.folder.look()
        self.stage.renew(self.folder.catalogue, self.folder.book, warm=())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve meanwhile."""
        with in_thread(self.stage.run, stop=self.stage.stop), ExitStack() as stack:
            stack.callback(self.gate.set)
            yield


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def answer(ending: Ending) -> Any:
    assert isinstance(ending, RunningJob)
    row = ending.answers[0]
    assert row is not None
    return row["y"].tolist()


def test_a_batch_that_runs_ends_by_its_model_and_what_waits_for_the_replaced_one_is_read_again(device: Device) -> None:
    with device.running():
        device.jobs.put([device.job("one")])
        assert device.begun.wait(20)
        device.jobs.put([device.job("one"), device.job("other")])
        device.edit("one", 3.0)
        device.gate.set()
        assert until(lambda: len(device.endings.all) == 2 and len(device.admissions.all) == 1)
        assert [answer(ending) for ending in device.endings.all] == [[2.0, 4.0]] * 2
        assert device.admissions.all[0][0].job == "one"
        device.jobs.put([device.job("one")])
        assert until(lambda: len(device.endings.all) == 3)
        assert answer(device.endings.all[2]) == [3.0, 6.0]


def test_what_is_replaced_or_removed_is_unloaded_and_what_only_has_another_summary_stays(device: Device) -> None:
    models = {name: device.folder.catalogue.resolve(name) for name in ("one", "other")}
    before = {name: device.executor.load(model, "onnx") for name, model in models.items()}
    write_model(device.root, "one", scale_graph(2.0), **SCALE_SPECS, summary="Another.")
    (device.root / "other" / "model.yaml").unlink()
    device.renew()
    device.executor.renew(device.folder.catalogue, device.folder.book)
    assert device.executor.all_loaded() == [before["one"]]
    assert device.executor.ready(device.folder.catalogue.resolve("one"), "onnx") is before["one"]
    assert device.executor.ready(models["one"], "onnx") is None
    assert before["other"].runtime.memory() == 0


def test_a_variant_in_use_is_unloaded_once_it_is_not_and_its_memory_counts_until_then(device: Device) -> None:
    loaded = device.executor.load(device.folder.catalogue.resolve("one"), "onnx")
    loaded.in_use = True
    held = device.executor.memory_used()
    device.edit("one", 3.0)
    device.executor.renew(device.folder.catalogue, device.folder.book)
    assert (device.executor.all_loaded(), device.executor.memory_used()) == ([], held)
    loaded.in_use = False
    device.executor.sweep()
    assert device.executor.memory_used() == 0


def test_a_load_of_a_model_that_is_replaced_meanwhile_is_dropped_and_jobs_wait_for_the_new_one(device: Device) -> None:
    old = device.job("one")
    device.executor.renew(device.folder.catalogue, ProfileBook())
    loads = device.stage._loads
    loads.wait(old)
    loads.begin(lambda urgency: ())
    assert until(lambda: loads.ended)
    device.edit("one", 3.0)
    device.executor.renew(device.folder.catalogue, ProfileBook())
    assert (loads.drop_outdated(), loads.rows) == ([old], 0)
    loads.wait(new := device.job("one"))
    assert loads.finish() == []
    loads.begin(lambda urgency: ())
    assert until(lambda: loads.ended)
    assert loads.finish() == [new]
    assert device.executor.ready(new.model, "onnx") is not None


def test_a_model_that_becomes_warm_is_loaded_with_no_job(device: Device) -> None:
    with device.running():
        device.stage.renew(device.folder.catalogue, ProfileBook(), warm=[device.folder.catalogue.resolve("other")])
        assert until(lambda: [loaded.key for loaded in device.executor.all_loaded()] == ["other:1/onnx"])


def test_a_variant_that_could_not_be_loaded_is_tried_at_once_after_a_change(device: Device) -> None:
    model = device.folder.catalogue.resolve("one")
    (device.root / "one" / "graph.onnx").rename(device.root / "away")
    with pytest.raises(Exception, match="is unavailable on this device"):
        device.executor.load(model, "onnx")
    (device.root / "away").rename(device.root / "one" / "graph.onnx")
    path = device.root / "one" / "model.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "summary": "Repaired."}))
    device.renew()
    device.executor.renew(device.folder.catalogue, device.folder.book)
    assert device.executor.load(device.folder.catalogue.resolve("one"), "onnx").key == "one:1/onnx"


@pytest.fixture
def idle(tmp_path: Path) -> Device:
    opened = Device(tmp_path)
    opened.gate.set()
    return opened


def ready(idle: Device, name: str = "one") -> RunningJob:
    """A job whose variant is loaded, decoded."""
    job = idle.job(name)
    loaded = idle.executor.ready(job.model, job.variant) or idle.executor.load(job.model, job.variant)
    prepare(job, loaded)
    return job


def test_a_job_alone_runs_on_its_callers_thread(idle: Device) -> None:
    assert idle.stage.run_alone(ready(idle))
    [ending] = idle.endings.all
    assert answer(ending) == [2.0, 4.0]
    assert idle.stage.use.busy > 0


def test_it_is_left_to_the_device_thread_where_that_has_work_or_runs(idle: Device) -> None:
    idle.gate.clear()
    job, other = ready(idle), ready(idle, "other")
    idle.jobs.put([job])
    assert not idle.stage.run_alone(other)
    with idle.running():
        assert idle.begun.wait(20)
        assert not idle.stage.run_alone(other)
        idle.gate.set()
        assert until(lambda: len(idle.endings.all) == 1)


def test_the_device_thread_waits_for_it_and_runs_what_came_meanwhile(idle: Device) -> None:
    idle.gate.clear()
    first, second = ready(idle), ready(idle)
    with idle.running():
        with in_thread(until, lambda: idle.stage.run_alone(first), stop=idle.gate.set):
            assert idle.begun.wait(20)
            idle.jobs.put([second])
            assert not idle.endings.all
        assert until(lambda: len(idle.endings.all) == 2)
    assert idle.endings.all == [first, second]


def test_one_that_waits_for_others_is_run_by_the_device_thread(idle: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.001])
    due = Lane.due
    monkeypatch.setattr(Lane, "due", lambda lane, now, clock: max(due(lane, now, clock), next(waits, 0.0)))
    job = ready(idle)
    with idle.running():
        assert until(lambda: idle.stage.run_alone(job))  # once the thread has begun
        assert until(lambda: len(idle.endings.all) == 1)


BATCH = 4


@pytest.fixture
def stage(tmp_path: Path) -> DeviceStage:
    executor = an_executor(tmp_path, a_class(max_batch=BATCH, max_run=0.1))
    parts = shared()
    return DeviceStage(DeviceQueue(), parts.endings.put, executor, parts)


def jobs(stage: DeviceStage, count: int) -> list[RunningJob]:
    """Jobs of a row each."""
    return [a_running_job(hardware=stage.variants.hardware, key="echo") for _ in range(count)]


def test_a_device_asks_for_up_to_two_batches_and_leaves_others_the_second(stage: DeviceStage) -> None:
    assert stage.wait_for_capacity(10.0) == BATCH
    stage._inbox.put(jobs(stage, BATCH))
    asked = time.monotonic()
    assert stage.wait_for_capacity(10.0) == BATCH
    assert time.monotonic() - asked >= OTHERS_FIRST
    stage._inbox.put(jobs(stage, BATCH))
    assert stage.wait_for_capacity(0.01) == 0


def slept(stage: DeviceStage, level: int, size: int) -> RunningJob:
    """A prepared job of `paced`, which the executor has loaded, of one row."""
    job = a_running_job("paced", delivery=a_delivery(a_ticket(level=level)), hardware=stage.variants.hardware)
    assert stage.variants.ready(job.model, "paced") or stage.variants.load(job.model, "paced")
    job.items = [Item({}, size)]
    job.patient = patient_seconds(job, stage.variants)
    job.answers = [None]
    gather(job)
    return job


def test_a_device_with_enough_patient_work_asks_for_what_is_more_urgent_alone(stage: DeviceStage) -> None:
    long = int(stage.ahead / 0.0001)  # of a tenth of a millisecond each
    assert stage.levels() == LEVELS
    stage._inbox.put([slept(stage, 1, long)])
    assert stage.levels() == LEVELS  # somebody waits for that
    stage._inbox.put([slept(stage, 3, 1)])
    assert stage.levels() == LEVELS
    stage._inbox.put([slept(stage, 3, long)])
    assert stage.levels() == PATIENT
    stage._collect()
    assert stage.levels() == PATIENT
    while stage._lanes:
        next(iter(stage._lanes)).take(0.0)
    assert stage.levels() == LEVELS


def executor_of(folder: Path, **fields: int) -> Executor:
    return an_executor(folder, msgspec.structs.replace(bench_class("cpu"), **fields))


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the niceness by thread")
def test_only_patient_work_gets_a_lower_cpu_priority(tmp_path: Path) -> None:
    executor = executor_of(tmp_path, nice=3)
    lower = min(niceness() + 3, 19)
    assert executor.at_level(PATIENT, math.inf, niceness) == lower
    assert executor.at_level(PATIENT - 1, math.inf, niceness) == niceness()
    assert executor.at_level(PATIENT, NOTICED / 2, niceness) == niceness()
    assert niceness() < lower or lower == 19


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_what_patient_work_raises_is_raised_to_its_caller(tmp_path: Path, error: BaseException) -> None:
    executor = executor_of(tmp_path, nice=3)

    def fail() -> None:
        raise error

    for _ in range(2):  # the thread lives on
        with pytest.raises(type(error)):
            executor.at_level(PATIENT, math.inf, fail)
    assert executor.at_level(PATIENT, math.inf, lambda: 1) == 1


HARDWARE = load_topology(TREE / "queues.yaml").hardware


def test_the_cpu_is_found_with_its_memory_and_instruction_sets() -> None:
    device = find_device(HARDWARE["cpu.batch"], "cpu:0-1", emulate=False)
    assert (device.kind, device.label, device.address, device.emulated) == ("cpu", "cpu:0-1", "cpu", False)
    assert device.memory == psutil.virtual_memory().total
    assert device.instruction_sets == look().instruction_sets
    assert 0 < memory_free(device) < device.memory
    assert {"echo", "python"} <= set(device.runtimes), "they need no package"
    assert utilisation(device) is None


@pytest.mark.cases("name, label, found, emulated")
def test_an_emulated_class_runs_on_the_cpu_and_says_so(name: str, label: str, found: str, emulated: bool) -> None:
    device = find_device(HARDWARE[name], label, emulate=True)
    assert (device.kind, device.address, device.label, device.emulated) == ("cpu", "cpu", found, emulated)


@pytest.mark.parametrize("label", ["cuda:0", "cpu:x", "cpu:0:1", "gpu"])
def test_a_label_of_another_kind_is_refused(label: str) -> None:
    with pytest.raises(DeviceMissingError, match="expected a device like cpu:0"):
        find_device(HARDWARE["cpu.batch"], label, emulate=False)


@pytest.mark.parametrize("name", ["gpu.realtime", "tpu.bulk"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    hardware: HardwareClass = HARDWARE[name]
    with pytest.raises(DeviceMissingError, match=r"this machine has|on this machine"):
        find_device(hardware, f"{hardware.device}:31", emulate=False)


@pytest.mark.gpu
def test_an_nvidia_device_is_found_with_its_memory_and_capability() -> None:
    if not look().cuda:
        pytest.skip("this machine has no NVIDIA device")
    device = find_device(HARDWARE["gpu.realtime"], "cuda:0", emulate=False)
    assert (device.kind, device.address, device.emulated) == ("cuda", "cuda:0", False)
    assert device.name == look().cuda[0]
    assert device.memory > 2**30
    assert any(name.startswith("sm_") for name in device.instruction_sets)
    assert 0 < memory_free(device) <= device.memory
    share = utilisation(device)
    assert share is not None and 0 <= share <= 1


TOPOLOGY = a_topology(cpu=a_class())


def test_a_worker_may_be_told_what_its_node_costs() -> None:
    assert options_from({"TAXIWAY_CLASS": "cpu"}, TOPOLOGY).usd_per_hour is None
    assert options_from({"TAXIWAY_CLASS": "cpu", USD_PER_HOUR: "0.28"}, TOPOLOGY).usd_per_hour == 0.28


@pytest.mark.parametrize("price", ["0", "-1", "nan", "inf", "free"])
def test_a_price_that_is_none_is_refused_by_name(price: str) -> None:
    with pytest.raises(SettingsError, match="TAXIWAY_USD_PER_HOUR: expected US dollars an hour, above 0"):
        options_from({"TAXIWAY_CLASS": "cpu", USD_PER_HOUR: price}, TOPOLOGY)
