"""Starts what a benchmark measures, as it ships: the embedded broker, a router, workers, and the peer's worker."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plain_celery import app
from tasks.children import start_child, stop_child
from tasks.embedded import EmbeddedValkey
from tasks.settings import TREE, Settings, cache_directory

PATIENCE = 60.0
"""Seconds within which a process must be ready, and end when asked."""


class NotReadyError(Exception):
    """A process ended or said nothing in time; the text ends with its log."""


@dataclass(frozen=True, slots=True)
class Doors:
    """Where the fleet is reached."""

    broker: str
    http: str


@contextmanager
def fleet_and_peer(folder: Path) -> Iterator[Doors]:
    """A router and one cpu.batch worker, and beside them a plain Celery worker, all on one Valkey in `folder`.

    The fleet has database 0 and the peer database 1, so that neither hears the other's broadcasts.
    """
    workers = [["--class", "cpu.batch", "--device", "cpu:0"]]
    with (
        fleet(folder, TREE / "benchmarks" / "queues.yaml", workers) as doors,
        _peer_worker(f"{doors.broker.rpartition('/')[0]}/1", folder / "celery.log"),
    ):
        yield doors


@contextmanager
def fleet(folder: Path, queues: Path, workers: Sequence[Sequence[str]]) -> Iterator[Doors]:
    """A router and a worker for each list of arguments, on one Valkey in `folder`; they end with the block."""
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(EmbeddedValkey(folder))
        settings = Settings(
            broker=valkey.url,
            state=valkey.url,
            secret=secrets.token_bytes(32),
            queues=queues,
            models=TREE / "models",
            cache=cache_directory(os.environ),
        )
        variables = settings.environment()
        router = ["-m", "router", "--host", "127.0.0.1", "--port", "0"]
        ready = stack.enter_context(_started(router, variables, folder / "router.log"))
        for number, arguments in enumerate(workers):
            command = ["-m", "workers", *arguments]
            stack.enter_context(_started(command, variables, folder / f"worker-{number}.log"))
        yield Doors(broker=valkey.url, http=ready["http"])


@contextmanager
def _started(arguments: list[str], variables: Mapping[str, str], log: Path) -> Iterator[dict[str, Any]]:
    """A Python process of the fleet while it runs, and the line it printed when it was ready."""
    with _running([sys.executable, *arguments], variables, log) as process:
        assert process.stdout is not None
        heard, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline() if heard else b""
        if not line:
            raise NotReadyError(f"{' '.join(arguments)} is not ready; {log} ends with:\n{log.read_text()[-2000:]}")
        yield json.loads(line)


@contextmanager
def _peer_worker(url: str, log: Path) -> Iterator[None]:
    """The plain Celery worker on Celery's default pool with one process."""
    command = [sys.executable, "-m", "celery", "--app", "benchmarks.plain_celery", "worker"]
    options = ["--pool", "prefork", "--concurrency", "1", "--task-events", "--loglevel", "warning"]
    variables = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}
    app.conf.update(broker_url=url, result_backend=url)
    with _running([*command, *options], variables, log):
        if not app.tasks["plain.echo"].delay("ready").get(timeout=PATIENCE):
            raise NotReadyError(f"the plain Celery worker gave a wrong answer; see {log}")
        yield


@contextmanager
def _running(command: list[str], variables: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1", **variables}
    with log.open("ab") as errors:
        process = start_child(command, environment=environment, output=subprocess.PIPE, errors=errors.fileno())
    try:
        yield process
    finally:
        stop_child(process, patience=PATIENCE)
        assert process.stdout is not None
        process.stdout.close()
