"""Starts a fleet and keeps it running: the embedded broker or the user's servers, a router, workers and Flower."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from broker.valkey.records import heartbeat_call
from local.embedded import EmbeddedValkey, kept_port, kept_secret
from local.plan import FLOWER_PORT, HTTP_PORT, Ask, Autoscaler, Bounds, Plan, WorkerPlan, ask_router
from local.state import Fleet, ProcessState, RunningWorker, supervising, write_fleet
from local.supervisor import SupervisedProcess, Supervisor
from tasks.settings import Settings, settings_from
from taxiway.valkey import ServerError
from taxiway.valkey.blocking import Connections

START_PATIENCE = 240.0
"""Seconds within which all processes must be ready: the first start compiles JAX programs, possibly on one core."""

STOP_PATIENCE = 15.0
"""Seconds that a process has to end when asked, for a worker after `limits.grace`, in which it finishes its jobs."""

_GROUPS = 4  # stopped one after another: workers, router, Flower, broker
_QUICK = 1.0  # time-out in seconds of a health check on loopback


@dataclass(frozen=True, slots=True)
class Options:
    """The user's options. Port 0 means the last port used, else the usual one, else a free one."""

    data: Path
    port: int = 0
    flower: bool = True
    flower_port: int = 0


@dataclass(frozen=True, slots=True)
class _Processes:
    """A fleet's processes, each worker with its plan; `flower_url` is None without Flower.

    The tuner runs where workers are started on demand.
    """

    router: SupervisedProcess
    workers: tuple[tuple[WorkerPlan, SupervisedProcess], ...]
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
    plan: Plan,
    options: Options,
    environment: Mapping[str, str],
    announce: Callable[[Fleet], None],
    bounds: Bounds | None = None,
    ask: Ask = ask_router,
) -> None:
    """Start the fleet, call `announce` when all of it is ready, and keep it running until SIGTERM or SIGINT.

    With `bounds`, only as many of the plan's workers run as `ask` says, by default as a router wants.

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
            scaled = frozenset() if bounds is None else frozenset(worker.hardware_class for worker in plan.workers)
            processes = _processes(plan, options, {**environment, **settings.environment()}, scaled)
            supervisor = Supervisor(broker, processes.stop_order())
            describe = partial(_fleet, settings, plan, options, processes, partial(_broker_state, broker, supervisor))
            watch = partial(
                supervisor.watch,
                tend=_tending(processes, bounds, environment, ask),
                failed=partial(_forget_device, settings.state),
            )
            _supervise(supervisor, processes, describe, announce, watch)
        finally:
            if supervisor is not None:
                supervisor.stop()
            elif broker is not None:
                broker.stop()


def _tending(
    processes: _Processes, bounds: Bounds | None, environment: Mapping[str, str], ask: Ask
) -> Callable[[], None]:
    """The function that resizes classes while the fleet runs; does nothing without bounds."""
    if bounds is None:
        return lambda: None
    key = environment.get("TAXIWAY_KEY", "")
    return Autoscaler(processes.workers, bounds, lambda name: ask(_said(processes.router, "http"), key, name)).tend


def _supervise(
    supervisor: Supervisor,
    processes: _Processes,
    describe: Callable[[], Fleet],
    announce: Callable[[Fleet], None],
    watch: Callable[[Callable[[], None]], None],
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: supervisor.request_stop())
    if not supervisor.start(partial(_healthy, processes), patience=START_PATIENCE):
        return
    fleet = describe()
    write_fleet(Path(fleet.data), fleet)
    announce(fleet)
    watch(lambda: write_fleet(Path(fleet.data), describe()))


def _broker(data: Path, environment: Mapping[str, str]) -> EmbeddedValkey | None:
    """The embedded server; None if the user's servers hold both messages and state."""
    broker = environment.get("TAXIWAY_BROKER", "")
    state = environment.get("TAXIWAY_STATE", "")
    if broker and (state or not broker.startswith("amqp")):
        return None
    return EmbeddedValkey(data)


def _settings(broker: EmbeddedValkey | None, data: Path, environment: Mapping[str, str]) -> Settings:
    """The fleet's settings: the user's, with the embedded server as default, and absolute file paths."""
    told = {"TAXIWAY_SECRET": kept_secret(data / "signing.secret")}
    if broker is not None:
        told |= {"TAXIWAY_BROKER": broker.url, "TAXIWAY_STATE": broker.url}
    settings = settings_from(told | {name: value for name, value in environment.items() if value})
    files = {name: getattr(settings, name).absolute() for name in ("queues", "models", "cache")}
    return replace(settings, **files)


def _processes(plan: Plan, options: Options, environment: Mapping[str, str], scaled: Set[str]) -> _Processes:
    """The fleet's processes. The router counts on devices of the `scaled` classes being started when wanted."""
    logs = options.data / "logs"
    logs.mkdir(exist_ok=True)
    make = partial(SupervisedProcess, environment=environment, logs=logs, patience=STOP_PATIENCE)
    grace = plan.grace + STOP_PATIENCE
    port = options.port or kept_port(options.data / "http.port", HTTP_PORT)
    router = make("router", _router_arguments(port, scaled), announces=True)
    workers = tuple(
        (worker, make(worker.name, worker.command(), announces=True, patience=grace)) for worker in plan.workers
    )
    tuner = make("tuner", ["-m", "simulator", "tune"], announces=False) if scaled else None
    if not options.flower:
        return _Processes(router, workers, None, None, tuner)
    port = options.flower_port or kept_port(options.data / "flower.port", FLOWER_PORT)
    flower = make("flower", _flower_arguments(port), announces=False)
    return _Processes(router, workers, flower, f"http://127.0.0.1:{port}", tuner)


def _router_arguments(port: int, scaled: Set[str]) -> Sequence[str]:
    starts = ["--starts", ",".join(sorted(scaled))] if scaled else []
    return ["-m", "router", "--host", "127.0.0.1", "--port", str(port), *starts]


def _flower_arguments(port: int) -> Sequence[str]:
    """Flower's command. Without a login its API refuses every change, so that the page can only be looked at."""
    flower = ["flower", "--address=127.0.0.1", f"--port={port}", "--inspect_timeout=2000"]
    return ["-m", "celery", "-A", "local.watcher", *flower]


def _healthy(processes: _Processes) -> bool:
    doors = [f"{_said(processes.router, 'http')}/v2/health/ready"]
    if processes.flower_url is not None:
        doors.append(f"{processes.flower_url}/healthcheck")
    return all(map(_answers, doors))


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=_QUICK, trust_env=False).status_code == httpx.codes.OK
    return False


def _fleet(
    settings: Settings,
    plan: Plan,
    options: Options,
    processes: _Processes,
    broker: Callable[[], Sequence[ProcessState]],
) -> Fleet:
    return Fleet(
        broker=settings.broker,
        state=settings.state,
        http=_said(processes.router, "http"),
        flower=processes.flower_url,
        pid=os.getpid(),
        router_pid=processes.router.process.pid,
        data=str(options.data),
        workers=tuple(_running(worker, process) for worker, process in processes.workers if not process.resting),
        left_out=plan.left_out,
        patience=plan.grace + _GROUPS * STOP_PATIENCE,
        processes=(*broker(), *(_state(process) for process in processes.all() if not process.resting)),
    )


def _running(worker: WorkerPlan, process: SupervisedProcess) -> RunningWorker:
    return RunningWorker(
        hardware_class=worker.hardware_class,
        device=worker.device,
        emulated=worker.emulated,
        worker=_said(process, "worker"),
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
    """Delete the heartbeat of a failed worker, so that nothing is placed on it until it is restarted."""
    worker = _said(process, "worker")
    if not worker:
        return
    with (
        suppress(ServerError, OSError),  # its heartbeat then expires
        closing(Connections(state, answer=_QUICK)) as connections,
    ):
        connections.run(heartbeat_call(worker, b""))


def _said(process: SupervisedProcess, field: str) -> Any:
    """A field of the process's last ready line; empty before the first."""
    return process.said.get(field, "")
