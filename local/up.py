"""Starts a fleet and keeps it running: the embedded broker or the user's servers, a router, workers and Flower.

A fleet's state is in its data directory: its supervisor, and the addresses of its interfaces.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from broker.valkey.presence import heartbeat_call
from local.autoscaler import Ask, Autoscaler, Replanner, WorkerBounds, ask_router
from local.embedded import EmbeddedValkey, kept_port, kept_secret
from local.fleet import LocalFleet, ProcessState, RunningWorker, failing, supervising, write_fleet
from local.plan import FLOWER_PORT, HTTP_PORT, StartPlan, WorkerPlan
from local.supervisor import START_TIMEOUT, SupervisedProcess, Supervisor
from tasks.queues.queues_file import QueuesFile
from tasks.settings import Settings, on_socket, settings_from
from tasks.topology import Topology
from tasks.web import answers
from taxiway.connection import ConnectionPool
from taxiway.contract.keys import FAILING, name_key
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


@dataclass(frozen=True, slots=True)
class _Addresses:
    """The fleet's server in the forms of `LocalFleet`."""

    broker: str
    celery_broker: str
    socket: str | None = None


@dataclass(frozen=True, slots=True)
class _Processes:
    """A fleet's processes, each worker with its plan; `flower_url` is None without Flower.

    The tuner runs where workers are started on demand.
    """

    router: SupervisedProcess
    workers: list[tuple[WorkerPlan, SupervisedProcess]]
    flower: SupervisedProcess | None
    flower_url: str | None
    tuner: SupervisedProcess | None

    def stop_order(self) -> list[list[SupervisedProcess]]:
        flower = [self.flower] if self.flower is not None else []
        tuner = [self.tuner] if self.tuner is not None else []
        return [[*(process for _, process in self.workers), *tuner], [self.router], flower]

    def all(self) -> list[SupervisedProcess]:
        """Every process, the router first."""
        workers = [process for _, process in self.workers]
        others = [process for process in (self.flower, self.tuner) if process is not None]
        return [self.router, *workers, *others]


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
        broker = _broker(options.data, environment)
        if broker is not None:
            broker.start()
        supervisor = None
        try:
            settings = _settings(broker, options.data, environment)
            queues = QueuesFile(settings.queues)
            plan = planned(queues.topology)
            scaled = frozenset() if bounds is None else frozenset(worker.hardware_class for worker in plan.workers)
            site_key = options.data.absolute() / "site.key"
            kept_secret(site_key)
            variables = {"TAXIWAY_SITE_KEY": str(site_key), **environment, **settings.environment()}
            processes = _processes(plan, options, variables, scaled)
            order = processes.stop_order()
            added = partial(_added_worker, partial(_worker, plan, options, variables), order[0])
            replanner = Replanner(queues, planned, processes.workers, added, scaled=bounds is not None)
            scaler = None if bounds is None else _autoscaler(processes, bounds, environment, ask)
            supervisor = Supervisor(broker, order)
            state = partial(_broker_state, broker, supervisor)
            describe = partial(_fleet, _addresses(broker, settings), plan, options, processes, state)
            tell = partial(_describe, describe, settings.broker)
            watch = partial(
                supervisor.watch,
                tend=partial(_tend, replanner, scaler),
                ended=partial(_forget_device, settings.broker),
            )
            _supervise(supervisor, processes, tell, announce, watch)
            _report_failures(settings.broker, {})
        finally:
            if supervisor is not None:
                supervisor.stop()
            elif broker is not None:
                broker.stop()


def _tend(replanner: Replanner, scaler: Autoscaler | None) -> None:
    replanner.tend()
    if scaler is not None:
        scaler.tend()


def _autoscaler(processes: _Processes, bounds: WorkerBounds, environment: Mapping[str, str], ask: Ask) -> Autoscaler:
    key = environment.get("TAXIWAY_KEY", "")
    return Autoscaler(processes.workers, bounds, lambda name: ask(_announced(processes.router, "http"), key, name))


def _supervise(
    supervisor: Supervisor,
    processes: _Processes,
    tell: Callable[[], LocalFleet],
    announce: Callable[[LocalFleet], None],
    watch: Callable[[Callable[[], object]], None],
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: supervisor.request_stop())
    if not supervisor.start(partial(_healthy, processes), timeout=START_TIMEOUT):
        return
    announce(tell())
    watch(tell)


def _describe(describe: Callable[[], LocalFleet], state: str) -> LocalFleet:
    """The fleet as it is now, which is written to `fleet.json` and the state store."""
    fleet = describe()
    write_fleet(Path(fleet.data), fleet)
    _report_failures(state, failing(fleet))
    return fleet


def _report_failures(state: str, found: Mapping[str, str]) -> None:
    """Tell routers which of this machine's processes failed, if the store answers."""
    host = socket.gethostname()
    named = {f"{name}@{host}": why for name, why in found.items()}
    command = ("HSET", FAILING, host, msgspec.json.encode(named)) if named else ("HDEL", FAILING, host)
    with suppress(ServerError, OSError), closing(ConnectionPool(state, answer=_ANSWER_WITHIN)) as connections:
        connections.calls(command)


def _broker(data: Path, environment: Mapping[str, str]) -> EmbeddedValkey | None:
    """The embedded server; None if the user has one."""
    return None if environment.get("TAXIWAY_BROKER") else EmbeddedValkey(data)


def _settings(broker: EmbeddedValkey | None, data: Path, environment: Mapping[str, str]) -> Settings:
    """The fleet's settings: the user's, with the embedded server as default, and absolute file paths."""
    own = {"TAXIWAY_SECRET": kept_secret(data / "signing.secret")}
    if broker is not None:
        own |= {"TAXIWAY_BROKER": broker.socket_url}
    settings = settings_from(own | {name: value for name, value in environment.items() if value})
    files = {name: getattr(settings, name).absolute() for name in ("queues", "models", "cache")}
    return replace(settings, **files)


def _processes(plan: StartPlan, options: UpOptions, environment: Mapping[str, str], scaled: Set[str]) -> _Processes:
    """The fleet's processes. Devices of the `scaled` classes are started on demand, which the router relies on."""
    logs = options.data / "logs"
    logs.mkdir(exist_ok=True)
    make = partial(SupervisedProcess, environment=environment, logs=logs, timeout=STOP_TIMEOUT)
    port = options.port or kept_port(options.data / "http.port", HTTP_PORT)
    router = make("router", _router_arguments(port, scaled), announces=True)
    workers = [(worker, _worker(plan, options, environment, worker)) for worker in plan.workers]
    tuner = make("tuner", ["-m", "simulator", "tune"], announces=False) if scaled else None
    if not options.flower:
        return _Processes(router, workers, None, None, tuner)
    port = options.flower_port or kept_port(options.data / "flower.port", FLOWER_PORT)
    flower = make("flower", _flower_arguments(port), announces=False)
    return _Processes(router, workers, flower, f"http://127.0.0.1:{port}", tuner)


def _worker(
    plan: StartPlan, options: UpOptions, environment: Mapping[str, str], worker: WorkerPlan
) -> SupervisedProcess:
    grace, logs = plan.grace + STOP_TIMEOUT, options.data / "logs"
    return SupervisedProcess(worker.name, worker.command(), environment, logs, announces=True, timeout=grace)


def _added_worker(
    make: Callable[[WorkerPlan], SupervisedProcess], group: list[SupervisedProcess], worker: WorkerPlan
) -> SupervisedProcess:
    """A new worker, added to the group that is stopped first."""
    process = make(worker)
    group.append(process)
    return process


def _router_arguments(port: int, scaled: Set[str]) -> Sequence[str]:
    starts = ["--starts", ",".join(sorted(scaled))] if scaled else []
    return ["-m", "api", "--host", "127.0.0.1", "--port", str(port), *starts]


def _flower_arguments(port: int) -> Sequence[str]:
    """Flower's command. Without a login its API refuses every change, so that the page is read-only."""
    flower = ["flower", "--address=127.0.0.1", f"--port={port}", "--inspect_timeout=2000"]
    return ["-m", "celery", "-A", "local.watcher", *flower]


def _healthy(processes: _Processes) -> bool:
    interfaces = [f"{_announced(processes.router, 'http')}/v2/health/ready"]
    if processes.flower_url is not None:
        interfaces.append(f"{processes.flower_url}/healthcheck")
    return all(answers(url, timeout=_ANSWER_WITHIN) for url in interfaces)


def _addresses(broker: EmbeddedValkey | None, settings: Settings) -> _Addresses:
    """The broker's addresses for others: on loopback, and on the socket that the fleet uses."""
    if broker is None:
        return _Addresses(settings.broker, on_socket(settings.broker))
    near, far = broker.socket_url, broker.url
    return _Addresses(far, on_socket(near), near if near != far else None)


def _fleet(
    addresses: _Addresses,
    plan: StartPlan,
    options: UpOptions,
    processes: _Processes,
    broker: Callable[[], Sequence[ProcessState]],
) -> LocalFleet:
    return LocalFleet(
        broker=addresses.broker,
        socket=addresses.socket,
        celery_broker=addresses.celery_broker,
        http=_announced(processes.router, "http"),
        flower=processes.flower_url,
        pid=os.getpid(),
        router_pid=processes.router.process.pid,
        data=str(options.data),
        workers=tuple(_running(worker, process) for worker, process in processes.workers if not process.resting),
        left_out=plan.left_out,
        scaled=frozenset(worker.hardware_class for worker, _ in processes.workers if processes.tuner is not None),
        timeout=plan.grace + _GROUPS * STOP_TIMEOUT,
        processes=(*broker(), *(_state(process) for process in processes.all() if not process.resting)),
    )


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


def _broker_state(broker: EmbeddedValkey | None, supervisor: Supervisor) -> Sequence[ProcessState]:
    """The embedded broker's state; empty if the user has servers."""
    if broker is None:
        return ()
    restarts, last_exit = supervisor.broker_restarts, supervisor.broker_exit
    pid, log = broker.pid, str(broker.log)
    return (
        ProcessState(name="broker", pid=pid, ready=pid is not None, log=log, restarts=restarts, last_exit=last_exit),
    )


def _forget_device(state: str, process: SupervisedProcess) -> None:
    """Delete the heartbeat of a worker that ended: nothing is placed on it until it is restarted. Free its name."""
    worker = _announced(process, "worker")
    if not worker:
        return
    with (
        suppress(ServerError, OSError),  # its heartbeat then expires
        closing(ConnectionPool(state, answer=_ANSWER_WITHIN)) as connections,
    ):
        connections.run(heartbeat_call(worker, b""))
        connections.calls(("DEL", name_key(worker)))


def _announced(process: SupervisedProcess, field: str) -> Any:
    """A field of the process's last ready line; empty before the first."""
    return process.announced.get(field, "")
