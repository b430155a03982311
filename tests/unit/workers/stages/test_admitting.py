"""What admitting a job raises ends that job alone, and a job that may have ended two workers is given up."""

import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

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
from taxiway.contract.values import Blobs
from taxiway.contract.wire import request_body
from taxiway.errors import BrokerUnavailableError, DeadLetteredError, ExecutionError, TaxiwayError
from tests.builders import a_class, a_ticket, a_topology
from tests.unit.workers.parts import MODELS, a_delivery, a_running_job, an_executor, no_store, shared
from workers.device import WorkerContext, WorkerOptions
from workers.executor import Executor
from workers.learned import Loaded
from workers.port import Item, Row
from workers.stages.admit import MOST_ENDED, AdmitStage, prepare
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
