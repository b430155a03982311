"""Starts what a benchmark measures, as shipped: the embedded broker, a router, workers, and the peer's worker."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.measure import tree
from benchmarks.harness.plain_celery import app
from local.children import start_child, stop_child
from local.embedded import EmbeddedValkey
from tasks.settings import TREE, Settings, cache_directory, on_socket

TIMEOUT = 60.0
"""Seconds within which a process must become ready, and exit when terminated."""


class NotReadyError(Exception):
    """A process exited or was not ready in time; the text ends with its log."""


@dataclass(frozen=True, slots=True)
class Interfaces:
    """The fleet's addresses, and its processes by role."""

    broker: str
    http: str
    processes: Mapping[str, list[int]] = field(default_factory=dict)


@contextmanager
def fleet_and_peer(folder: Path) -> Iterator[Interfaces]:
    """A router and one cpu.batch worker, and beside them a plain Celery worker, all on one Valkey in `folder`.

    The fleet uses database 0 and the peer database 1, so neither receives the other's broadcasts.
    """
    workers = [["--class", "cpu.batch", "--device", "cpu:0"]]
    with (
        fleet(folder, TREE / "benchmarks" / "queues.yaml", workers) as interfaces,
        _peer_worker(on_socket(interfaces.broker.replace("?db=0", "?db=1")), folder / "celery.log") as peer,
    ):
        yield replace(interfaces, processes={**interfaces.processes, "celery": [peer]})


@contextmanager
def fleet(
    folder: Path, queues: Path, workers: Sequence[Sequence[str]], models: Path = TREE / "models"
) -> Iterator[Interfaces]:
    """A router and a worker for each list of arguments, on one Valkey in `folder`; they end with the block."""
    with EmbeddedValkey(folder) as valkey:
        assert valkey.pid is not None
        settings = broker_settings(valkey.socket_url, queues, models)
        with serving(folder, settings, workers) as interfaces:
            yield replace(interfaces, processes={"broker": [valkey.pid], **interfaces.processes})


@contextmanager
def serving(folder: Path, settings: Settings, workers: Sequence[Sequence[str]]) -> Iterator[Interfaces]:
    """Workers and then a router, on a running broker; their logs go to `folder`.

    A router without a worker would refuse the jobs in arrivals.
    """
    variables, router = settings.environment(), ["-m", "api", "--host", "127.0.0.1", "--port", "0"]
    with contextlib.ExitStack() as stack:
        crew = [
            stack.enter_context(started(["-m", "workers", *arguments], variables, folder / f"worker-{number}.log"))
            for number, arguments in enumerate(workers)
        ]
        ready = stack.enter_context(started(router, variables, folder / "router.log"))
        processes = {"router": [ready["pid"]], "worker": [worker["pid"] for worker in crew]}
        yield Interfaces(broker=settings.broker, http=ready["http"], processes=processes)


def broker_settings(url: str, queues: Path, models: Path = TREE / "models") -> Settings:
    """The environment of a fleet whose broker and state store are one Valkey."""
    return Settings(
        broker=url, secret=(secrets.token_bytes(32),), queues=queues, models=models, cache=cache_directory(os.environ)
    )


@contextmanager
def started(arguments: list[str], variables: Mapping[str, str], log: Path) -> Iterator[dict[str, Any]]:
    """A Python process of the fleet while it runs, and the line it printed when it was ready, with its `pid`."""
    with running([sys.executable, *arguments], variables, log, output=subprocess.PIPE) as process:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], TIMEOUT)
        line = process.stdout.readline() if readable else b""
        if not line:
            raise NotReadyError(f"{' '.join(arguments)} is not ready; {log} ends with:\n{log.read_text()[-2000:]}")
        yield {**json.loads(line), "pid": process.pid}


@contextmanager
def _peer_worker(url: str, log: Path) -> Iterator[int]:
    """The plain Celery worker, with Celery's default pool and one process; its pid."""
    command = [sys.executable, "-m", "celery", "--app", "benchmarks.harness.plain_celery", "worker"]
    options = ["--pool", "prefork", "--concurrency", "1", "--task-events", "--loglevel", "warning"]
    variables = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}
    app.conf.update(broker_url=url, result_backend=url)
    with running([*command, *options], variables, log) as process:
        if not app.tasks["plain.echo"].delay("ready").get(timeout=TIMEOUT):
            raise NotReadyError(f"the plain Celery worker gave a wrong answer; see {log}")
        yield process.pid


@contextmanager
def running(
    command: Sequence[str], variables: Mapping[str, str], log: Path, *, output: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the duration of the block; it and its descendants have exited afterwards.

    Its output goes to `log`; its stdout goes to `output` if given. A pipe must be read, or it fills up.
    """
    environment = {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1", **variables}
    with log.open("ab") as log_file:
        stdout = log_file.fileno() if output is None else output
        process = start_child(
            command, environment=environment, output=stdout, errors=log_file.fileno(), piped_input=True
        )
    try:
        yield process
    finally:
        below = tree(process.pid)
        stop_child(process, timeout=TIMEOUT)
        _end(below)
        for pipe in filter(None, (process.stdin, process.stdout)):
            pipe.close()


def _end(processes: Sequence[psutil.Process]) -> None:
    """Kill processes that still run after a second: some servers leave one behind."""
    _, alive = psutil.wait_procs(processes, timeout=1)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=TIMEOUT)
