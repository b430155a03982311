"""The contestants and how each is started: taxiway, Celery in three configurations, and four model servers."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import fleet, running
from benchmarks.suite.batch_loop import MODELS
from benchmarks.suite.callers import Caller, CeleryCaller, ClientCaller, interface_caller, peer_caller
from benchmarks.suite.catalogue import CLASS, queues_of
from benchmarks.suite.installing import AbsentError, interpreter
from benchmarks.suite.workloads import Plan, payloads
from local.embedded import EmbeddedValkey, kept_port, within
from tasks.settings import on_socket

TIMEOUT = 120.0
"""Seconds within which a server must answer its first request."""

THREADS = 32
"""Threads of Celery's thread pool for a workload that only waits."""


@dataclass(frozen=True, slots=True)
class Up:
    """A running contestant: its callers by their names in the results, and its processes by role."""

    callers: Mapping[str, Callable[[], Caller]]
    processes: Mapping[str, list[int]]


Start = Callable[[Plan, Path, Path], AbstractContextManager[Up]]
"""Runs a contestant for a plan, with a folder for its files and the catalogue's folder."""


@dataclass(frozen=True, slots=True)
class Server:
    """A peer with an HTTP interface.

    Attributes:
        command: the arguments of its interpreter.
        body: a payload as a request's body.
    """

    name: str
    package: str
    path: str
    body: Callable[[Any], bytes]
    command: Callable[[Plan], Sequence[str]]

    @contextmanager
    def start(self, plan: Plan, folder: Path, models: Path) -> Iterator[Up]:
        """See `Start`."""
        python, log = interpreter(self.name, [self.package]), folder / f"{self.name}.log"
        served = replace(plan, port=kept_port(folder / f"{self.name}.port"))
        variables = served.environment() | {MODELS: str(models), **_QUIET}
        with running([python, *self.command(served)], variables, log) as process:
            body = self.body(payloads(plan)[0])
            answers = partial(_answers, served.port, self.path, body)
            if not within(TIMEOUT, lambda: process.poll() is not None or answers(), every=0.1):
                raise AbsentError(f"no answer within {TIMEOUT:g} s; its log ends with {log.read_text()[-300:]!r}")
            if process.poll() is not None:
                raise AbsentError(f"it ended; its log ends with {log.read_text()[-300:]!r}")
            yield Up({self.name: lambda: peer_caller(served, self.path, self.body)}, {"server": [process.pid]})


@contextmanager
def start_fleet(plan: Plan, folder: Path, models: Path) -> Iterator[Up]:
    """taxiway: broker, router and the plan's workers, called by the client and at the HTTP API. See `Start`."""
    queues = folder / "queues.yaml"
    queues.write_text(queues_of(plan.workload.model, rows=plan.rows, wait=plan.workload.wait))
    threads = ["--threads", str(plan.threads)]
    workers = [["--class", CLASS, "--device", f"cpu:{n}", *threads] for n in range(plan.workers)]
    with fleet(folder, queues, workers, models) as interfaces:
        yield Up(
            {
                "taxiway": lambda: ClientCaller(plan, interfaces.broker),
                "taxiway-http": lambda: interface_caller(plan, interfaces.http),
            },
            interfaces.processes,
        )


@dataclass(frozen=True, slots=True)
class Celery:
    """Plain Celery on its own Valkey with the fleet's durability: append-only file, flushed every second."""

    name: str
    pool: str
    task: str
    concurrency: Callable[[Plan], int]

    @contextmanager
    def start(self, plan: Plan, folder: Path, models: Path) -> Iterator[Up]:
        """See `Start`."""
        packages = [f"celery=={version('celery')}", f"redis=={version('redis')}", f"hiredis=={version('hiredis')}"]
        python, log = interpreter("celery", packages), folder / f"{self.name}.log"
        with EmbeddedValkey(folder) as valkey:
            url = on_socket(valkey.socket_url)
            urls = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}
            variables = plan.environment() | urls | {MODELS: str(models)}
            command = ["-m", "celery", "--app", "benchmarks.suite.peers.celery", "worker", "--task-events"]
            pool = ["--pool", self.pool, "--concurrency", str(self.concurrency(plan)), "--loglevel", "warning"]
            with running([python, *command, *pool], variables, log) as process:
                assert valkey.pid is not None
                yield Up(
                    {self.name: lambda: CeleryCaller(plan, url, self.task)},
                    {"broker": [valkey.pid], "worker": [process.pid]},
                )


def waiting_threads(plan: Plan) -> int:
    """One thread per outstanding request if the workload waits; if it computes, one per core."""
    return plan.processes if plan.workload.computes else THREADS


def enough_threads(plan: Plan) -> int:
    """Threads that fill two batches."""
    return 2 * plan.rows


def as_json(payload: Any) -> bytes:
    """JSON, a photograph as base64 text."""
    value = base64.b64encode(payload).decode() if isinstance(payload, bytes) else payload
    return json.dumps(value, separators=(",", ":")).encode()


def as_it_is(payload: Any) -> bytes:
    """JSON, a photograph as it is."""
    return payload if isinstance(payload, bytes) else as_json(payload)


def as_a_batch(payload: Any) -> bytes:
    """A batch of one, by the name of BentoML's argument."""
    return b'{"payloads":[' + as_json(payload) + b"]}"


def _module(name: str) -> Callable[[Plan], Sequence[str]]:
    return lambda plan: ["-m", f"benchmarks.suite.peers.{name}"]


def _bentoml(plan: Plan) -> Sequence[str]:
    service = "benchmarks.suite.peers.bentoml:Inference"
    return ["-m", "bentoml", "serve", service, "--host", "127.0.0.1", "--port", str(plan.port)]


SERVERS = (
    Server("litserve", "litserve", "/predict", as_json, _module("litserve")),
    Server("mosec", "mosec", "/inference", as_it_is, _module("mosec")),
    Server("ray", "ray[serve]", "/", as_it_is, _module("ray")),
    Server("bentoml", "bentoml", "/predict", as_a_batch, _bentoml),
)

CELERIES = (
    Celery("celery-prefork", "prefork", "plain.run", lambda plan: plan.processes),
    Celery("celery-threads", "threads", "plain.run", waiting_threads),
    Celery("celery-batching", "threads", "plain.batched", enough_threads),
)

CONTESTANTS: dict[str, Start] = {"taxiway": start_fleet, **{each.name: each.start for each in (*CELERIES, *SERVERS)}}

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "BENTOML_DO_NOT_TRACK": "True", "RAY_AUTH_MODE": "disabled"}
"""No usage reports, and no token for each call within a Ray that only this machine reaches."""


def _answers(port: int, path: str, body: bytes) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    kind = "image/jpeg" if body[:2] == b"\xff\xd8" else "application/json"
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", path, body, {"content-type": kind})
        return connection.getresponse().status == http.HTTPStatus.OK
    return False
