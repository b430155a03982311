"""How requests are read and admitted: each ends alone, and what many refer to is fetched at once."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest

from broker.valkey.claims import Claim, Verdict
from broker.valkey.worker_store import WorkerStore
from tasks.models.folder import ModelsFolder
from tasks.models.model import Model
from tasks.models.profiles import KnownProfile
from tasks.models.signature import bind
from tasks.queues.queues_file import QueuesFile
from tasks.settings import TREE, Settings
from taxiway.contract.keys import PATIENT
from taxiway.contract.request import Request
from taxiway.contract.values import Blobs, Reference
from taxiway.contract.wire import request_body
from taxiway.errors import (
    BrokerUnavailableError,
    DeadLetteredError,
    ExecutionError,
    InvalidRequestError,
    ResultExpiredError,
    TaxiwayError,
)
from tests.builders import a_class, a_ticket, a_topology
from tests.graphs import SCALE_SPECS, scale_graph, write_model
from tests.unit.workers.parts import MODELS, a_delivery, a_running_job, an_executor, no_store, shared
from workers.device import WorkerContext, WorkerOptions
from workers.executor import Executor
from workers.learned import Loaded
from workers.port import Item, Row
from workers.stages.admit import FETCHED_BYTES, MOST_ENDED, AdmitStage, JobReader, prepare
from workers.stages.job import Delivery, Ended
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


def test_an_estimate_that_fails_ends_its_job_alone(tmp_path: Path) -> None:
    passed, ended = Desk(tmp_path).admit(delivery("a", "echo"), delivery("b", "paced"), delivery("c", "echo"))
    assert passed == ["a", "c"]
    assert isinstance(ended["b"], ExecutionError)
    assert "OverflowError: integer division" in ended["b"].message


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


def test_a_blob_that_is_gone_fails_its_request() -> None:
    reading = Reading()
    delivery = reading.delivery(b"a" * 20)
    reading.blobs.contents.clear()
    with pytest.raises(ResultExpiredError):
        reading.read(delivery)


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
