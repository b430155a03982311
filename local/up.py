"""Starts a fleet and keeps it running: the embedded broker or the user's servers, a router, workers and Flower.

A fleet's state is in its data directory: its supervisor, and the addresses of its interfaces.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from broker.valkey.processes import heartbeat_call
from local.autoscaler import Ask, Autoscaler, Replanner, WorkerBounds, ask_router
from local.embedded import EmbeddedValkey, kept_port, kept_secret
from local.fleet import LocalFleet, ProcessState, RunningWorker, failing, supervising, write_fleet
from local.plan import FLOWER_PORT, HTTP_PORT, StartPlan, WorkerPlan
from local.supervisor import START_TIMEOUT, SupervisedProcess, Supervisor
from tasks import web
from tasks.queues.queues_file import QueuesFile
from tasks.settings import Settings, on_socket, settings_from
from tasks.topology import Topology
from taxiway.connection import ConnectionPool
from taxiway.contract.keys import FAILING, PLAN, name_key
from taxiway.valkey import ServerError

STOP_TIMEOUT = 15.0
"""Seconds that a process has to end when asked; a worker has `limits.grace` before that to finish its jobs."""

_GROUPS = 4  # stopped one after another: workers, router, Flower, broker
_ANSWER_WITHIN = 1.0  # timeout in seconds of a health check on loopback


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The user's options. Port 0 means the last port used, else the default one, else a free one."""

    data: Path
    port: int = 0
    flower: bool = True
    flower_port: int = 0


def run_fleet(
    planned: Callable[[Topology], StartPlan],
    options: UpOptions,
    environment: Mapping[str, str],
    announce: Callable[[LocalFleet], None],
    bounds: WorkerBounds | None = None,
    ask: Ask = ask_router,
) -> None:
    """Start the fleet, call `announce` when all of it is ready, and keep it running until SIGTERM or SIGINT.

    `planned` plans the workers by queues.yaml, again when that changes. With `bounds`, only as many of them run as
    `ask` says, by default as a router wants.

    Raises:
        AlreadyRunningError: a fleet runs from the same data directory.
        EmbeddedValkeyError, StartError, SettingsError: it cannot be started; nothing is left running.
    """
    with supervising(options.data):
        broker = None if environment.get("TAXIWAY_BROKER") else EmbeddedValkey(options.data)
        if broker is not None:
            broker.start()
        fleet = None
        try:
            settings = _settings(broker, options.data, environment)
            queues = QueuesFile(settings.queues)
            plan, key = planned(queues.topology), environment.get("TAXIWAY_KEY", "")
            fleet = _Processes(plan, options, settings, environment, broker, scaled=bounds is not None)
            replanner = Replanner(queues, planned, fleet.workers, fleet.added, scaled=bounds is not None)
            tending: list[Replanner | Autoscaler] = [replanner]
            if bounds is not None:
                tending.append(Autoscaler(fleet.workers, bounds, lambda name: ask(fleet.http, key, name)))
            fleet.run(announce, tending)
        finally:
            if fleet is not None:
                fleet.supervisor.stop()
            elif broker is not None:
                broker.stop()


def _settings(broker: EmbeddedValkey | None, data: Path, environment: Mapping[str, str]) -> Settings:
    """The fleet's settings: the user's, with the embedded server as default, and absolute file paths."""
    own = {"TAXIWAY_SECRET": kept_secret(data / "signing.secret")}
    if broker is not None:
        own |= {"TAXIWAY_BROKER": broker.socket_url}
    settings = settings_from(own | {name: value for name, value in environment.items() if value})
    files = {name: getattr(settings, name).absolute() for name in ("queues", "models", "cache")}
    return replace(settings, **files)


class _Processes:
    """A fleet's processes, each of the `workers` with its plan, and what others get to know of them.

    With `scaled`, devices are started on demand, which the router relies on, and a tuner runs.
    """

    def __init__(
        self,
        plan: StartPlan,
        options: UpOptions,
        settings: Settings,
        environment: Mapping[str, str],
        broker: EmbeddedValkey | None,
        *,
        scaled: bool,
    ) -> None:
        self._plan, self._data, self._settings, self._broker = plan, options.data, settings, broker
        site_key = options.data.absolute() / "site.key"
        kept_secret(site_key)
        self._environment = {"TAXIWAY_SITE_KEY": str(site_key), **environment, **settings.environment()}
        self._scaled = scaled
        self._flower_url: str | None = None
        classes = ",".join(sorted({worker.hardware_class for worker in plan.workers})) if scaled else ""
        port = options.port or kept_port(options.data / "http.port", HTTP_PORT)
        router = ["-m", "api", "--host", "127.0.0.1", "--port", str(port), *(["--starts", classes] if classes else [])]
        self._router = self._process("router", router, announces=True)
        self.workers = [(worker, self._worker(worker)) for worker in plan.workers]
        tuner = [self._process("tuner", ["-m", "simulator", "tune"])] if scaled else []
        flower = [self._flower(options)] if options.flower else []
        self._beside = [*flower, *tuner]
        self._first = [*(process for _, process in self.workers), *tuner]
        self.supervisor = Supervisor(broker, [self._first, [self._router], flower])

    @property
    def http(self) -> str:
        """The router's address; empty until it is ready."""
        return str(_announced(self._router, "http"))

    def added(self, worker: WorkerPlan) -> SupervisedProcess:
        """A new worker, in the group that is stopped first."""
        process = self._worker(worker)
        self._first.append(process)
        return process

    def run(self, announce: Callable[[LocalFleet], None], tending: Sequence[Replanner | Autoscaler]) -> None:
        """Start all, and keep it running until a signal."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self.supervisor.request_stop())
        if self._broker is not None and not self._scaled:  # no tuner will renew the plan of a fleet that was
            with self._store() as connections:
                connections.calls(("DEL", PLAN))
        if self.supervisor.start(self._healthy, timeout=START_TIMEOUT):
            announce(self._describe())
            self.supervisor.watch(self._describe, [one.tend for one in tending], self._forget_device)
        self._report_failures({})

    def _process(
        self, name: str, arguments: Sequence[str], *, announces: bool = False, timeout: float = STOP_TIMEOUT
    ) -> SupervisedProcess:
        logs = self._data / "logs"
        return SupervisedProcess(name, arguments, self._environment, logs, announces=announces, timeout=timeout)

    def _worker(self, worker: WorkerPlan) -> SupervisedProcess:
        return self._process(worker.name, worker.command(), announces=True, timeout=self._plan.grace + STOP_TIMEOUT)

    def _flower(self, options: UpOptions) -> SupervisedProcess:
        """Flower. Without a login its API refuses every change, so that the page is read-only."""
        port = options.flower_port or kept_port(options.data / "flower.port", FLOWER_PORT)
        self._flower_url = f"http://127.0.0.1:{port}"
        flower = ["flower", "--address=127.0.0.1", f"--port={port}", "--inspect_timeout=2000"]
        return self._process("flower", ["-m", "celery", "-A", "local.watcher", *flower])

    def _healthy(self) -> bool:
        interfaces = [f"{self.http}/v2/health/ready"]
        if self._flower_url is not None:
            interfaces.append(f"{self._flower_url}/healthcheck")
        return all(web.ask(url, timeout=_ANSWER_WITHIN) is not None for url in interfaces)

    def _describe(self) -> LocalFleet:
        """The fleet as it is now, which is written to `fleet.json` and the state store."""
        fleet = self._fleet()
        write_fleet(self._data, fleet)
        self._report_failures(failing(fleet))
        return fleet

    def _fleet(self) -> LocalFleet:
        near, far = (
            (self._settings.broker,) * 2 if self._broker is None else (self._broker.socket_url, self._broker.url)
        )
        processes = [self._router, *(process for _, process in self.workers), *self._beside]
        return LocalFleet(
            broker=far,
            socket=near if near != far else None,
            celery_broker=on_socket(near),
            http=self.http,
            flower=self._flower_url,
            pid=os.getpid(),
            router_pid=self._router.process.pid,
            data=str(self._data),
            workers=tuple(_running(worker, process) for worker, process in self.workers if not process.resting),
            left_out=self._plan.left_out,
            scaled=frozenset(worker.hardware_class for worker, _ in self.workers if self._scaled),
            timeout=self._plan.grace + _GROUPS * STOP_TIMEOUT,
            processes=(*self._broker_state(), *(_state(process) for process in processes if not process.resting)),
        )

    def _broker_state(self) -> Sequence[ProcessState]:
        """The embedded broker's state; empty if the user has servers."""
        if self._broker is None:
            return ()
        pid, log = self._broker.pid, str(self._broker.log)
        restarts, last_exit = self.supervisor.broker_restarts, self.supervisor.broker_exit
        ready = pid is not None
        return (ProcessState(name="broker", pid=pid, ready=ready, log=log, restarts=restarts, last_exit=last_exit),)

    def _report_failures(self, found: Mapping[str, str]) -> None:
        """Tell routers which of this machine's processes failed, if the store answers."""
        host = socket.gethostname()
        named = {f"{name}@{host}": why for name, why in found.items()}
        with self._store() as connections:
            connections.calls(("HSET", FAILING, host, msgspec.json.encode(named)) if named else ("HDEL", FAILING, host))

    def _forget_device(self, process: SupervisedProcess) -> None:
        """Delete the heartbeat of a worker that ended: nothing is placed on it until it is restarted. Free its name."""
        if worker := _announced(process, "worker"):
            with self._store() as connections:
                connections.run(heartbeat_call(worker, b""))
                connections.calls(("DEL", name_key(worker)))

    @contextmanager
    def _store(self) -> Iterator[ConnectionPool]:
        """The state store; what it does not answer is left out."""
        with (
            suppress(ServerError, OSError),
            closing(ConnectionPool(self._settings.broker, answer=_ANSWER_WITHIN)) as pool,
        ):
            yield pool


def _running(worker: WorkerPlan, process: SupervisedProcess) -> RunningWorker:
    return RunningWorker(
        hardware_class=worker.hardware_class,
        device=worker.device,
        emulated=worker.emulated,
        worker=_announced(process, "worker"),
        pid=process.process.pid,
    )


def _state(process: SupervisedProcess) -> ProcessState:
    runs = process.due is None
    return ProcessState(
        name=process.name,
        pid=process.process.pid if runs else None,
        ready=process.ready and runs,
        log=str(process.log),
        restarts=process.restarts,
        last_exit=process.last_exit,
    )


def _announced(process: SupervisedProcess, field: str) -> Any:
    """A field of the process's last ready line; empty before the first."""
    return process.announced.get(field, "")
