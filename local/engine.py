"""`python -m local.engine --class NAME --device endpoint:0`: an endpoint's engine as a child process, and its worker.

`endpoint.start` in queues.yaml has the engine's command, or a GGUF file that llama.cpp serves (`local.llama`). If the
endpoint's URL has port 0, the engine gets a free one, which its worker gets. The worker starts once the engine is
ready; when the worker has drained and ended, the engine is stopped. An engine that fails is restarted; meanwhile its
worker takes no work. `taxiway up` starts and stops this process like any worker, so that an idle class has no engine.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from local.artefacts import LlamaMissingError, served_file
from local.children import start_child, stop_child
from local.embedded import free_port
from local.supervisor import RESTARTS
from tasks.machine import look
from tasks.models.artefacts import ArtefactError
from tasks.queues.endpoints import Endpoint, Health
from tasks.settings import TREE, queues_file
from tasks.telemetry import log_to_stderr
from tasks.topology import load_topology
from tasks.web import ask
from taxiway.errors import TaxiwayError
from workers.device import DeviceMissingError, endpoint_device
from workers.endpoints.protocol import open_protocol

logger = logging.getLogger("local.engine")

LONGEST_LOAD = 600.0
"""Seconds within which an engine must be ready: it may read its weights from a network first."""

STOPPED_WITHIN = 10.0
"""Seconds that an engine has to end when asked."""

NO_ENGINE = 4
"""Exit status: the engine ended or was not ready in time."""

_TICK = 0.1


class EngineProcess:
    """One replica's engine. For one thread: the engine is killed when it ends.

    Its threads compute for seconds on the cores that workers beside it need for milliseconds: it is `nice` to them.
    """

    def __init__(self, endpoint: Endpoint, url: str, words: Sequence[str], nice: int) -> None:
        assert endpoint.start is not None
        self._nice = nice
        self._command = [_placed(word, url) for word in words]
        health = Health(path="/health") if endpoint.start.llama else endpoint.health
        self._ready = _placed(endpoint.start.ready or health.url(url, open_protocol(endpoint.protocol).HEALTH), url)
        self._failures, self._due = 0, 0.0
        self._start()

    def wait(self, stopped: Sequence[int]) -> bool:
        """Wait until it is ready; False if it ended, took too long, or a signal arrived."""
        began = time.monotonic()
        while self._process.poll() is None and time.monotonic() - began < LONGEST_LOAD and not stopped:
            if ask(self._ready, timeout=1.0) is not None:
                logger.info("engine ready", extra={"seconds": round(time.monotonic() - began, 2)})
                return True
            time.sleep(_TICK)
        return False

    def tend(self) -> None:
        """Restart it after a failure."""
        if self._process.poll() is None:
            return
        if not self._due:
            self._failures += 1
            self._due = time.monotonic() + RESTARTS.pause(self._failures)
            logger.warning("engine ended, restarting", extra={"status": self._process.returncode})
        elif time.monotonic() >= self._due:
            self._due = 0.0
            self._start()

    def stop(self) -> None:
        """End it."""
        stop_child(self._process, timeout=STOPPED_WITHIN)

    def _start(self) -> None:
        logger.info("engine starting", extra={"command": self._command})
        self._process = start_child(self._command, output=sys.stderr.fileno(), errors=sys.stderr.fileno())
        with suppress(ProcessLookupError):  # it has no threads yet, which would keep their niceness
            os.setpriority(os.PRIO_PROCESS, self._process.pid, os.getpriority(os.PRIO_PROCESS, 0) + self._nice)


def words_of(endpoint: Endpoint, environment: Mapping[str, str]) -> Sequence[str]:
    """The engine's command.

    Raises:
        ArtefactError, LlamaMissingError, TaxiwayError: the file of `start.llama`, or what serves it, is missing.
    """
    assert endpoint.start is not None
    if endpoint.start.llama is None:
        return endpoint.start.words
    file = served_file(endpoint.start.llama, environment)
    names = sorted({*endpoint.calls.values()}) or [file.stem]
    # Threads wait for each other at each layer: with as many as cores, for every worker too.
    threads = max(look().cores // 2, 1)
    served = [str(file), "--host", "{host}", "--port", "{port}", "--slots", str(endpoint.slots)]
    served += ["--threads", str(threads), *(f"--name={name}" for name in names)]
    return [sys.executable, "-m", "local.llama", *served]


def _placed(text: str, url: str) -> str:
    """The text with the host and port of the replica at `url`."""
    parts = urlsplit(url)
    return text.replace("{host}", parts.hostname or "").replace("{port}", str(parts.port or ""))


def run(engine: EngineProcess, worker: Sequence[str], stopped: list[int]) -> int:
    """Run the worker beside the engine; returns its exit status. Signals in `stopped` are passed on to it."""
    try:
        if not engine.wait(stopped):
            logger.error("engine is not ready")
            return 0 if stopped else NO_ENGINE
        process = start_child(worker, folder=TREE)
        while process.poll() is None:
            for number in stopped:
                process.send_signal(number)
            stopped.clear()
            engine.tend()
            time.sleep(_TICK)
        return process.returncode
    finally:
        engine.stop()


def main(environment: Mapping[str, str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m local.engine", description="Runs an engine and its worker.")
    parser.add_argument("--class", dest="hardware_class", required=True)
    parser.add_argument("--device", default="endpoint:0")
    given = parser.parse_args()
    log_to_stderr("INFO")
    queues = queues_file(environment)
    hardware = load_topology(queues).hardware.get(given.hardware_class)
    if hardware is None or hardware.endpoint is None or hardware.endpoint.start is None:
        parser.error(f"{given.hardware_class} has no endpoint.start in queues.yaml")
    try:
        port = free_port()
        url = endpoint_device(hardware.endpoint, given.device, port).address.partition("#")[0]
        words = words_of(hardware.endpoint, environment)
    except (DeviceMissingError, ArtefactError, LlamaMissingError, TaxiwayError) as error:
        parser.error(str(error))
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))
    worker = [sys.executable, "-u", "-m", "workers", "--class", given.hardware_class, "--device", given.device]
    worker += ["--engine-port", str(port)]
    return run(EngineProcess(hardware.endpoint, url, words, hardware.nice), worker, stopped)


if __name__ == "__main__":
    sys.exit(main(os.environ))
