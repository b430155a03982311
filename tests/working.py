"""Workers as real processes, and the smallest router that can stand before them: it signs and queues, no more."""

from __future__ import annotations

import itertools
import os
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import redis
from celery import Celery

from broker.valkey import run
from broker.valkey.jobs import Ending, finish_call
from tasks.settings import TREE, Settings, cache_directory
from tasks.ticket import Ticket, attach
from taxiway.contract.job import JobState, Result, failure_meta, read_meta, read_result, result_in
from taxiway.contract.keys import (
    ARRIVALS,
    DEAD,
    INFER,
    job_key,
    priority_list,
    priority_lists,
    redis_priority,
    result_key,
)
from taxiway.contract.wire import Envelope, decode_envelope, encode_envelope, task_envelope
from taxiway.errors import JobCancelledError
from tests.builders import recorded
from tests.forked import Process, running
from tests.graphs import onnx_variant, spinner_graph, write_model
from tests.narrowing import as_bytes

CLASS = "cpu.batch"
_DATABASES = 16  # Valkey's default number of databases
_turns, _lasting_turns = (
    itertools.cycle(half) for half in (range(_DATABASES // 2), range(_DATABASES // 2, _DATABASES))
)

LONG = {"samples": [30_000_000], "seed": [1]}
"""A job of the model slab of a second or more."""

LASTING = {"samples": [-1], "seed": [1]}
"""One that runs until `release`: for what is to be seen while it does."""

QUEUES = recorded("fleets/worker.yaml")
SLAB = recorded("models/slab.yaml")


def empty_fleet(valkey_url: str, *, lasting: bool = False) -> Settings:
    """Settings of a fleet whose broker and state are the next database of a server, emptied.

    `lasting`: one that is not emptied for fleets of single tests meanwhile.
    """
    url = f"{valkey_url.rpartition('/')[0]}/{next(_lasting_turns if lasting else _turns)}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return Settings(
        broker=url,
        secret=(secrets.token_bytes(32),),
        queues=TREE / "queues.yaml",
        models=TREE / "models",
        cache=cache_directory(os.environ),
    )


def add_spinner(settings: Settings, *, base: float = 0.001) -> None:
    """Give a fleet the model spinner, whose batches cannot be ended. By its profile one takes `base` seconds."""
    graph = spinner_graph("turns", "turned")
    write_model(
        settings.models,
        "spinner",
        graph,
        inputs=[{"name": "turns", "datatype": "INT64", "shape": [-1]}],
        outputs=[{"name": "turned", "datatype": "INT64", "shape": [-1]}],
        variants={"onnx": onnx_variant(base)},
    )
    settings.queues.write_text(settings.queues.read_text().replace("[python, echo]", "[python, echo, onnx]"))


def worker_settings(settings: Settings, folder: Path, queues: str = QUEUES) -> Settings:
    """Settings of a small fleet whose leases are short: the models echo, paced and slab."""
    (folder / "queues.yaml").write_text(queues)
    models = folder / "models"
    add_callable(models, "slab")
    for name in ("echo", "paced"):
        (models / name).symlink_to(TREE / "models" / name)
    return replace(settings, queues=folder / "queues.yaml", models=models)


def add_callable(models: Path, name: str, text: str = "", code: str = "") -> None:
    """Add a recorded model, or that of a text, with the module of `tests.callables` that it calls beside it.

    `code`: the module's name, where it is not the model's.
    """
    (models / name).mkdir(parents=True)
    (models / name / "model.yaml").write_text(text or recorded(f"models/{name}.yaml"))
    (models / name / f"{code or name}.py").symlink_to(TREE / "tests" / "callables" / f"{code or name}.py")


def add_slow(models: Path, *, base: float, slope: float = 0.0001) -> None:
    """Add the model slow: paced, with batches of `base` seconds and `slope` seconds a row."""
    text = (TREE / "models" / "paced" / "model.yaml").read_text().replace("name: paced", "name: slow")
    text = text.replace("entry: paced", f"entry: paced={base}+{slope}")
    text = text.replace("base: 0.005, slope: 0.0001", f"base: {base}, slope: {slope}")
    (models / "slow").mkdir(parents=True)
    (models / "slow" / "model.yaml").write_text(text)


@dataclass(frozen=True)
class WorkerProcess:
    """A running `python -m workers`, and what it said when it was ready."""

    process: Process
    name: str


@contextmanager
def worker_process(settings: Settings, *options: str, log: Any = None) -> Iterator[WorkerProcess]:
    """A worker that consumes; killed at the end if the test did not stop it."""
    environment = {**os.environ, **settings.environment()}
    with running("workers", "workers", ["--class", CLASS, *options], environment, log) as (process, said):
        yield WorkerProcess(process, said["worker"])


@dataclass(frozen=True)
class Site:
    """A worker that lives through several tests, and what stands before it."""

    fleet: Settings
    tower: Tower
    worker: WorkerProcess

    def settle(self) -> None:
        """End what lasts, and wait until the worker has answered everything; no dead letter stays."""
        release(self.fleet)
        while self.tower.waiting() + self.tower.unacknowledged():
            time.sleep(0.005)
        (self.fleet.models.parent / "over").unlink()
        self.tower.state.delete(DEAD)


@contextmanager
def open_site(fleet: Settings, log: Any = None) -> Iterator[Site]:
    """The site, whose worker no test ends."""
    with Tower(fleet) as tower, worker_process(fleet, log=log) as worker:
        yield Site(fleet, tower, worker)
        assert worker.process.poll() is None


def inspect(app: Celery, worker: WorkerProcess) -> Any:
    """Celery's inspection of one worker; by its types every answer may be None, as from a worker that is gone."""
    return app.control.inspect([worker.name], timeout=60)


def release(settings: Settings) -> None:
    """End the jobs of the fleet that last."""
    (settings.models.parent / "over").touch()


class Tower:
    """Orders jobs as a router does, for one class."""

    def __init__(self, settings: Settings) -> None:
        self.state = redis.Redis.from_url(settings.broker)
        self._settings = settings

    def __enter__(self) -> Tower:
        return self

    def __exit__(self, *_: object) -> None:
        self.state.close()

    def message(self, model: str, inputs: Any, **terms: Any) -> Envelope:
        """A signed message, not queued yet.

        `terms`: job, variant, deadline_at, canvas, parts of the ticket, and the request's parameters and stream.
        """
        job = terms.get("job") or str(uuid.uuid4())
        canvas = {"callbacks": None, "errbacks": None, "chain": None, "chord": None} | terms.get("canvas", {})
        asked = {name: terms[name] for name in ("parameters", "stream") if name in terms}
        body = msgspec.json.encode([[], {"model": model, "inputs": inputs, **asked}, canvas])
        return self._signed(task_envelope(INFER, job, body, header={}, origin="test"), model, terms)

    def order(self, model: str, inputs: Any, **terms: Any) -> str:
        """Queue a job; its id."""
        envelope = self.message(model, inputs, **terms)
        self.queue(envelope)
        return str(envelope.headers["id"])

    def queue(self, *envelopes: Envelope, level: int = 1) -> None:
        """Publish messages to the class's queue, together."""
        raw = [encode_envelope(self._placed(envelope, redis_priority(level))) for envelope in envelopes]
        self.state.lpush(priority_list(CLASS, level), *raw)

    def route(self, model: str) -> int:
        """Sign and queue what plain Celery wrote to the arrivals; how many messages."""
        taken = [as_bytes(raw) for name in priority_lists(ARRIVALS) for raw in self.state.rpop(name, 100) or []]
        self.queue(*(self._signed(decode_envelope(raw), model, {}) for raw in taken))
        return len(taken)

    def cancel(self, job: str) -> None:
        """End a job as a router does for its client."""
        ending = Ending(job, JobState.CANCELLED, failure_meta(job, JobCancelledError("cancelled")))
        run(self.state, finish_call([ending], keep_result=60, keep_record=60))

    def result(self, job: str, *, within: float = 60.0) -> Result:
        """The job's result; raises the error that it ended with."""
        return read_result(read_meta(self.await_meta(job, within=within)))

    def await_meta(self, job: str, *, within: float = 60.0) -> bytes:
        """The stored result's bytes."""
        end = time.monotonic() + within
        while (raw := result_in(as_bytes(self.state.get(result_key(job)) or b"") or None)) is None:
            if time.monotonic() > end:
                raise AssertionError(f"job {job} has no result after {within:g} s")
            time.sleep(0.005)
        return raw

    def waiting(self) -> int:
        """Messages in the class's queue, all levels."""
        return sum(int(self.state.llen(name)) for name in priority_lists(CLASS))

    def unacknowledged(self) -> int:
        """Messages that a worker holds."""
        return int(self.state.hlen("unacked"))

    def _signed(self, envelope: Envelope, model: str, terms: Mapping[str, Any]) -> Envelope:
        variant = terms.get("variant") or {"slab": "python", "spinner": "onnx"}.get(model, model)
        ticket = Ticket(
            job=envelope.headers["id"],
            task=INFER,
            model=f"{model}:1",
            variants=terms.get("variants") or {CLASS: variant},
            prices=dict.fromkeys(terms.get("variants") or [CLASS], 0.05),
            tariffs=terms.get("tariffs") or {},
            runs=terms.get("runs", 0),
            accepted=time.time(),
            deadline_at=terms.get("deadline_at", 0.0),
            level=terms.get("level", 1),
            reason="the test says so",
            reply=terms.get("reply", ""),
            promise=terms.get("promise"),
        )
        attach(ticket, envelope, envelope.payload(), self._settings.secret)
        return envelope

    def _placed(self, envelope: Envelope, priority: int) -> Envelope:
        where = {"delivery_info": {"exchange": CLASS, "routing_key": CLASS}, "priority": priority}
        tag = {"delivery_tag": str(uuid.uuid4())}
        return msgspec.structs.replace(envelope, properties=envelope.properties | where | tag)


def is_running(tower: Tower, job: str) -> bool:
    """Whether the store records that the job runs."""
    return bool(tower.state.hget(job_key(job), "state") == b"running")
