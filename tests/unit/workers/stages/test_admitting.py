"""Jobs on their way to a device: read, admitted, held, waiting for a load, and in its lane until a batch takes them."""

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
from celery import Celery

from broker.valkey.jobs import Claim, Verdict
from broker.valkey.worker_store import WorkerStore
from tasks.models.catalogue import Catalogue
from tasks.models.folder import ModelsFolder, load_catalogue
from tasks.models.model import Model, Profile
from tasks.models.profiles import KnownProfile, ProfileBook
from tasks.models.signature import bind
from tasks.queues.limits import Limits
from tasks.queues.queues_file import QueuesFile
from tasks.settings import TREE, Settings
from taxiway.contract.keys import INFER, LEVELS, PATIENT
from taxiway.contract.request import Request
from taxiway.contract.values import Blobs, Reference
from taxiway.contract.wire import request_body
from taxiway.errors import BrokerUnavailableError, DeadLetteredError, InvalidRequestError, TaxiwayError
from tests.builders import a_class, a_ticket, a_topology, recorded
from tests.celery_double import Endings
from tests.graphs import SCALE_SPECS, scale_graph, write_model
from tests.unit.workers.parts import MODELS, a_delivery, a_running_job, an_executor, holding, no_store, shared
from tests.waiting import in_thread
from workers.celery_adapter.consumer import (
    SHOW_EVERY,
    SHOW_WAITING,
    SILENCE,
    ConsumerThread,
    Inspection,
    TaskEvent,
    TaskEvents,
)
from workers.decide.batcher import BatchPolicy
from workers.device import WorkerContext, WorkerOptions
from workers.executor import Executor
from workers.learned import Loaded
from workers.port import Item, Row
from workers.runtimes.echo import EchoRuntime
from workers.stages.admit import FETCHED_BYTES, MOST_ENDED, AdmitStage, JobReader, gather, prepare
from workers.stages.job import Delivery, Ended, Headers, RunningJob, Urgency
from workers.stages.lane import Lane, Lanes
from workers.stages.loads import LOAD_AT_MOST, Loads
from workers.stages.outcomes import WorkerOutcomes
from workers.stages.queues import DeviceQueue

CLASS = "cpu.batch"


class Unsure(Executor):
    """An executor that cannot say how long `paced` takes."""

    def known(self, model: Model, name: str) -> KnownProfile:
        if model.name == "paced":
            raise OverflowError("integer division result too large for a float")
        return super().known(model, name)


class Away(WorkerStore):
    """A store that does not answer."""

    def history(self, job: str) -> NoReturn:
        raise BrokerUnavailableError("the state store does not answer")


class Desk:
    """The admit stage of a worker, and what it passed on."""

    def __init__(self, folder: Path) -> None:
        hardware = a_class()
        executor = an_executor(folder, hardware, Unsure)
        self.jobs, parts = DeviceQueue(), shared(store=no_store(Away))
        self.endings = parts.endings
        settings = Settings("", (), TREE / "queues.yaml", TREE / "models", folder)
        models = ModelsFolder(settings.models, QueuesFile(settings.queues))
        context = WorkerContext(WorkerOptions(CLASS), settings, a_topology(**{CLASS: hardware}), models)
        self.stage = AdmitStage(self.jobs, executor, parts, context, threading.Event(), WorkerOutcomes("cpu:0"))

    def admit(self, *deliveries: Delivery) -> tuple[list[str], dict[str, TaxiwayError | None]]:
        """The jobs that go to the device, and the errors of those that ended."""
        with self.endings.collected() as ended:
            self.stage.admit(deliveries, 0.0)
        passed = [job.delivery.job for job in self.jobs.take(0.0, lambda: False)]
        return passed, {one.delivery.job: one.error for one in ended if isinstance(one, Ended)}


def delivery(job: str, model: str, *, blamed: int = 0) -> Delivery:
    body = request_body(Request(model=model, inputs={"payload": job}), Blobs(limit=1000))
    ticket = a_ticket(job, f"{model}:1", variants={CLASS: model}, level=PATIENT)
    return a_delivery(ticket, body, hardware_class=CLASS, claim=Claim(Verdict.RUN, "w#1", blamed=blamed))


def test_a_job_that_may_have_ended_two_workers_is_given_up(tmp_path: Path) -> None:
    passed, ended = Desk(tmp_path).admit(delivery("a", "echo"), delivery("b", "echo", blamed=MOST_ENDED))
    assert passed == ["a"]
    assert isinstance(ended["b"], DeadLetteredError)
    assert "2 workers ended while they held the job" in ended["b"].message


class Noted:
    """A pipeline that notes the seed of each prompt."""

    def __init__(self) -> None:
        self.seeds: list[tuple[Any, Any]] = []

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        self.seeds.append((row["prompt"], parameters["seed"]))
        return Item({}, 1, parameters)


def seeds_of(prompts: Any, **parameters: Any) -> list[tuple[Any, Any]]:
    model, pipeline = MODELS.resolve("generate"), Noted()
    bound = bind(model, prompts, parameters)
    job = a_running_job(model, rows=bound.rows, parameters=bound.parameters)
    prepare(job, cast(Loaded, SimpleNamespace(key=job.key, pipeline=pipeline)))
    return pipeline.seeds


def test_a_prompt_that_comes_again_in_a_job_has_a_seed_one_higher_each_time() -> None:
    assert seeds_of(["a", "a"]) == [("a", None), ("a", None)], "left to chance"
    assert seeds_of(["a", "a", "b", b"c", "a"], seed=5) == [("a", 5), ("a", 6), ("b", 5), (b"c", 5), ("a", 7)]


class Reading:
    """A reader, with the blobs that are there and what was fetched by each call."""

    def __init__(self) -> None:
        self.blobs = Blobs(limit=16)
        self.calls: list[list[str]] = []
        self.reader = JobReader(
            ModelsFolder(TREE / "models", QueuesFile(TREE / "queues.yaml")), {CLASS: a_class()}, self._fetch
        )

    def delivery(self, payload: bytes) -> Delivery:
        body = request_body(Request(model="echo", inputs={"payload": payload}), self.blobs)
        return a_delivery(a_ticket(variants={CLASS: "echo"}), body, hardware_class=CLASS)

    def read(self, *deliveries: Delivery) -> list[bytes]:
        """The payloads of the jobs."""
        groups = self.reader.groups(deliveries)
        jobs = [self.reader.read(one, 0.0, contents) for some, contents in groups for one in some]
        return [job.rows[0]["payload"] for job in jobs]

    def _fetch(self, found: Sequence[Reference]) -> dict[str, bytes | None]:
        refs = [reference.ref for reference in found]
        self.calls.append(refs)
        kept = self.blobs.contents
        return {ref: bytes(kept[ref]) if ref in kept else None for ref in refs}


@pytest.mark.parametrize(
    ("given", "fetched"),
    [
        ([b"short"], []),
        ([b"a" * 20, b"short", b"c" * 30], [2]),
        ([b"a" * (FETCHED_BYTES + 1), b"b" * FETCHED_BYTES, b"c" * 20], [1, 1, 1]),  # large ones apart, in order
    ],
    ids=["no blob", "several", "large"],
)
def test_what_several_requests_refer_to_is_fetched_by_one_call(given: list[bytes], fetched: list[int]) -> None:
    reading = Reading()
    assert reading.read(*map(reading.delivery, given)) == given
    assert [len(call) for call in reading.calls] == fetched


def test_a_request_that_a_router_accepted_by_a_newer_model_yaml_is_bound_by_that(tmp_path: Path) -> None:
    write_model(tmp_path, "scale", scale_graph(2.0), **SCALE_SPECS)
    reader = JobReader(ModelsFolder(tmp_path, QueuesFile(TREE / "queues.yaml")), {CLASS: a_class()}, lambda found: {})
    body = request_body(Request(model="scale", inputs={"z": [[1.0, 2.0]]}), Blobs(limit=16))
    delivery = a_delivery(a_ticket(model="scale:1", variants={CLASS: "onnx"}), body, hardware_class=CLASS)
    with pytest.raises(InvalidRequestError):
        reader.read(delivery, 0.0, {})
    renamed = {**SCALE_SPECS, "inputs": [{**SCALE_SPECS["inputs"][0], "name": "z"}]}
    write_model(tmp_path, "scale", scale_graph(2.0, name="z"), **renamed)
    assert reader.read(delivery, 0.0, {}).rows[0]["z"].tolist() == [1.0, 2.0]


PROFILE = Profile(base=0.001, slope=1e-6)
HARDWARE = a_class(max_batch=8)
BUCKET = 1_000_000


def job(*sizes: int, deadline: float = 100.0) -> RunningJob:
    """A job with rows of these sizes, all of one bucket."""
    made = a_running_job("ising", hardware=HARDWARE, key="k", rows=({},), single=False, deadline=deadline)
    made.items = [Item({}, size) for size in sizes]
    made.answers = [None] * len(sizes)
    gather(made)
    return made


def lane(max_run: float, *jobs: RunningJob, pace: float = 1.0) -> Lane:
    """A lane in which these jobs wait."""
    made = Lane(("k", BUCKET, "", "c"), BatchPolicy(8, 0.0, max_run), PROFILE, lambda: pace)
    for one in jobs:
        made.add(one)
    return made


def taken(made: Lane) -> list[int]:
    return [one.items[row].size for one, rows in made.take(0.0) for row in rows]


def test_a_batch_takes_as_many_rows_as_fit_into_max_run_by_their_own_sizes() -> None:
    small = lane(0.5, job(*[200_000] * 6))
    large = lane(0.5, job(*[900_000] * 6))
    assert (taken(small), taken(small), taken(small)) == ([200_000] * 2, [200_000] * 2, [200_000] * 2)
    assert taken(large) == [900_000]
    assert (small.rows, small.seconds) == (0, 0.0)
    assert large.seconds == pytest.approx(0.001 + 5 * 0.9)


def test_a_removed_job_no_longer_counts() -> None:
    leaving, staying = job(600_000), job(300_000)
    both = lane(0.7, leaving, staying)
    both.remove(leaving)
    assert both.seconds == pytest.approx(0.301)
    assert taken(both) == [300_000]


def test_the_batches_that_are_to_come_are_those_that_run() -> None:
    waiting = lane(0.5, job(200_000, 200_000, 900_000), job(150_000))
    foreseen = [seconds for _, seconds in waiting.batches()]
    ran = []
    while waiting:
        sizes = taken(waiting)
        ran.append(PROFILE.latency(len(sizes), sum(sizes) / len(sizes)))
    assert foreseen == pytest.approx(ran)


WAITS = a_class(max_batch=8, max_wait=0.05)


class Waiting:
    """Lanes of one device, whose batches take a second and 1 ms a row."""

    def __init__(self, folder: Path) -> None:
        self.lanes = Lanes(an_executor(folder, WAITS), lambda: 0.0)

    def add(self, model: str, level: int, *arrivals: float, due: float = 100.0) -> list[RunningJob]:
        """Jobs of a row each, in the order of their arrival."""
        found = MODELS.resolve(model)
        known = replace(ProfileBook().lookup(found, found.reference, "cpu", "t"), profile=Profile(1.0, 0.001))
        jobs = []
        for arrived in arrivals:
            delivery = a_delivery(a_ticket(level=level))
            job = a_running_job(model, hardware=WAITS, delivery=delivery, deadline=due, arrived=arrived)
            job.items, job.answers = [Item({}, 1)], [None]
            gather(job)
            loaded = Loaded(job.key, found, found.variants[found.reference], None, EchoRuntime(), known, 0.0)  # type: ignore[arg-type]
            self.lanes.add(job, loaded)
            jobs.append(job)
        return jobs


@pytest.mark.parametrize("level", range(LEVELS))
def test_a_batch_that_waits_runs_before_a_due_one_of_a_lower_level(tmp_path: Path, level: int) -> None:
    waiting = Waiting(tmp_path)
    urgent = waiting.add("echo", 1, 0.0, 0.001, 0.002)
    lane, wait = waiting.lanes.next(0.003)
    assert lane is None and wait > 0, "more rows are expected"
    (other,) = waiting.add("paced", level, 0.003)
    lane, wait = waiting.lanes.next(0.003)
    assert lane is not None and wait == 0
    assert lane.jobs() == (set(urgent) if level > 1 else {other})


MODEL = recorded("documents/model.yaml")


class Dock:
    """A device with room for one model, and what waits for it."""

    def __init__(self, folder: Path) -> None:
        for name in ("one", "other"):
            (folder / name).mkdir()
            (folder / name / "model.yaml").write_text(MODEL.format(name=name))
        self.catalogue: Catalogue = load_catalogue(folder)
        self.executor = an_executor(folder / "cache", a_class(runtimes=("echo", "python"), memory=100 * 2**20))
        self.failed: list[tuple[RunningJob, TaxiwayError]] = []
        self.woken = threading.Event()
        self.loads = Loads(self.executor, wake=self.woken.set, fail=self._fail)
        self.lined: dict[str, Urgency] = {}

    def job(
        self, model: str, variant: str = "echo", *, deadline: float = math.inf, arrived: float = 0.0, level: int = 1
    ) -> RunningJob:
        """A job that waits for its variant."""
        ticket = a_ticket(f"{model} {deadline} {arrived}", f"{model}:1", level=level)
        delivery, found = a_delivery(ticket), self.catalogue.resolve(model)
        job = a_running_job(found, delivery=delivery, variant=variant, arrived=arrived, deadline=deadline)
        self.loads.wait(job)
        return job

    def begin(self) -> None:
        """Begin a load, if one may."""
        self.loads.begin(lambda urgency: {key for key, lined in self.lined.items() if lined <= urgency})

    def finish(self) -> list[RunningJob]:
        """The jobs of the load that runs, once it has ended."""
        assert self.woken.wait(20)
        self.woken.clear()
        return self.loads.finish()

    def warm(self) -> set[str]:
        """What is loaded."""
        return {loaded.key for loaded in self.executor.all_loaded()}

    def _fail(self, jobs: Sequence[RunningJob], error: TaxiwayError) -> None:
        self.failed += [(job, error) for job in jobs]


@pytest.fixture
def dock(tmp_path: Path) -> Dock:
    return Dock(tmp_path)


def test_one_variant_loads_at_a_time_the_most_urgent_job_s_first(dock: Dock) -> None:
    dock.job("one", arrived=1.0)
    urgent = dock.job("other", deadline=5.0, arrived=2.0)
    dock.begin()
    dock.begin()
    assert dock.finish() == [urgent]


def test_a_variant_keeps_its_memory_in_use_and_until_the_more_urgent_of_its_jobs_have_run(dock: Dock) -> None:
    loaded = dock.executor.load(dock.catalogue.resolve("one"), "echo")
    dock.lined[loaded.key] = (1, math.inf, 1.0)
    job = dock.job("other", arrived=2.0)
    dock.begin()
    assert dock.warm() == {loaded.key}
    loaded.in_use, dock.lined[loaded.key] = True, (1, math.inf, 3.0)
    dock.begin()
    assert dock.warm() == {loaded.key}
    loaded.in_use = False
    dock.begin()
    assert dock.finish() == [job]
    assert dock.warm() == {"other:1/echo"}


def test_patient_jobs_displace_what_urgent_ones_use_once_and_then_not_for_a_while(
    dock: Dock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        dock.executor.used(dock.executor.load(dock.catalogue.resolve("one"), "echo"), level=0)
        job, put_off = dock.job("other", level=PATIENT), dock.warm()
        dock.begin()
        if (left := dock.loads.pause) == math.inf:
            assert dock.finish() == [job]
    assert dock.warm() == put_off
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + left)
    dock.begin()
    assert dock.finish() == [job]


@pytest.mark.parametrize("ran", [True, False])
def test_what_was_loaded_stays_until_it_has_run_or_for_as_long_as_its_load_took(
    dock: Dock, monkeypatch: pytest.MonkeyPatch, *, ran: bool
) -> None:
    job, now = dock.job("one", level=PATIENT), time.monotonic()
    dock.begin()
    assert dock.woken.wait(20)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert dock.finish() == [job]
    loaded, urgent = dock.executor.load(job.model, "echo"), dock.job("other", level=0)
    dock.begin()
    assert dock.warm() == {loaded.key}
    if ran:
        dock.executor.used(loaded, PATIENT)
    else:
        now += 2 * loaded.seconds
    dock.begin()
    assert dock.finish() == [urgent]


def test_a_load_hangs_once_it_takes_longer_than_loads_may(dock: Dock) -> None:
    began = time.monotonic()
    assert not dock.loads.hung(math.inf)
    dock.job("one")
    dock.begin()
    assert not dock.loads.hung(began + LOAD_AT_MOST)
    assert dock.loads.hung(time.monotonic() + LOAD_AT_MOST)
    dock.finish()
    assert not dock.loads.hung(math.inf)


def test_a_lost_variant_that_is_there_again_or_finds_no_room_is_not_loaded(dock: Dock) -> None:
    loaded = dock.executor.load(dock.catalogue.resolve("one"), "echo")
    dock.loads.replace(loaded.model, "echo")
    dock.begin()
    loaded.in_use = True
    dock.loads.replace(dock.catalogue.resolve("other"), "echo")
    dock.begin()
    dock.loads.replace(dock.catalogue.resolve("other"), "missing")
    loaded.in_use = False
    dock.begin()
    assert dock.finish() == [] and dock.failed == []


def nothing() -> None:
    """Stands for the task."""


def inspection() -> Inspection:
    app: Any = Celery(set_as_current=False)  # its stubs know neither its clock nor this use of `task`
    events = TaskEvents("w", app.clock, lambda topic, message: 1)
    return Inspection(app.task(nothing, name=INFER, shared=False), "w", events, ConsumerThread())


def test_events_are_left_out_for_a_while_after_no_monitor_received_some() -> None:
    app: Any = Celery(set_as_current=False)
    monitors, sent = [0], list[bytes]()

    def publish(topic: str, message: bytes) -> int:
        sent.append(message)
        return monitors[0]

    events, event = TaskEvents("w", app.clock, publish), TaskEvent("task-started", "j", 0.0)
    events.wanted = lambda: True
    for _ in range(2):
        events.add(event)
        events.flush()
    assert len(sent) == 1
    monitors[0], until = 1, time.monotonic() + 10 * SILENCE
    while not events.waiting and time.monotonic() < until:
        events.add(event)
    events.flush()
    events.add(event)
    assert (len(sent), events.waiting) == (2, 1)


def delivery_that_came(received: float) -> Delivery:
    return a_delivery(received=received, headers=Headers("j", INFER, ""))


def test_what_is_held_needs_no_renewal_yet_and_ends_once() -> None:
    delivery = delivery_that_came(0.0)
    jobs = holding(delivery)
    assert (jobs.all(), jobs.all(60.0)) == ([delivery], [])
    assert [jobs.remove(delivery), jobs.remove(delivery), len(jobs)] == [True, False, 0]


class SlowStore(WorkerStore):
    """Notes its calls; a renewal ends once claims lapse, or soon if they do not."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1", "w", Limits())
        self.calls: list[str] = []
        self.renewing, self.lapsing = threading.Event(), threading.Event()

    def renew(self, claims: Sequence[tuple[str, str]]) -> list[bool]:
        """As `WorkerStore.renew`."""
        self.renewing.set()
        self.lapsing.wait(0.2)
        self.calls.append("renewed")
        return [True] * len(claims)

    def let_lapse(self, claims: Sequence[tuple[str, str]]) -> None:
        """As `WorkerStore.let_lapse`."""
        self.calls.append("lapses")
        self.lapsing.set()

    def release(self, claims: Sequence[tuple[str, str]], *, counts: bool = False) -> None:
        """As `WorkerStore.release`."""


def test_a_claim_that_is_given_up_is_not_renewed_after_that() -> None:
    store, delivery = SlowStore(), a_delivery()
    delivery.claim, delivery.retries = Claim(Verdict.RUN, "t"), 1
    jobs = holding(delivery, store=store)
    with in_thread(jobs.renew, 0.0):
        assert store.renewing.wait(10)
        jobs.requeue([delivery])
    jobs.renew(0.0)
    assert store.calls == ["renewed", "lapses", "renewed"]
    assert jobs.all() == []


def test_a_job_is_shown_when_it_runs_or_waits_for_long_and_only_then() -> None:
    now = time.time()
    fresh, waits, runs = delivery_that_came(now + 3600), delivery_that_came(now - SHOW_WAITING), delivery_that_came(now)
    fresh.began, runs.began = now + 3600, now - SHOW_EVERY
    shown = inspection()
    assert shown.show(holding(fresh, waits, runs), Endings()) == [runs]
    starts = {delivery: request.time_start for delivery, request in shown._shown.items()}
    assert starts.keys() == {waits, runs}
    assert starts[waits] is None and starts[runs] is not None
    for delivery in (waits, runs):
        shown.report(delivery, None)
    shown._thread.run()
    assert not shown._shown
