"""The fleet under test: servers, cables, routers and workers as shipped, in one folder."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from local.embedded import kept_port
from local.supervisor import SupervisedProcess
from tasks.settings import TREE, Settings, settings_from
from tests.builders import recorded
from tests.cable import Cable, through
from tests.chaos.batch import MODEL as BATCH_MODEL
from tests.chaos.plan import Targets
from tests.chaos.processes import Processes
from tests.chaos.rabbit import RabbitServer
from tests.chaos.store import Store
from tests.graphs import hungry_graph, onnx_variant, spinner_graph, write_model

ROUTERS = 2
WORKERS = {"cpu.batch": 2, "cpu.spare": 2}

QUEUES = recorded("fleets/chaos.yaml")

_START = 120.0  # seconds within which the fleet must be ready
NOTES_FILE = "TAXIWAY_NOTED"
"""Variable with the file to which the model `tally` appends its calls."""

_SIDES = ("workers", "routers", "producers")
_BRIDGED = ("routers", "producers")


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running fleet, its parts by name. Without `rabbit` nothing is bridged. `settings` and `amqp` are producers'."""

    store: Store
    rabbit: RabbitServer | None
    processes: Processes
    cables: Mapping[str, Cable]
    clocks: Mapping[str, Path]
    settings: Settings
    amqp: str
    http: Mapping[str, str]
    notes: Path

    def targets(self) -> Targets:
        """The names of possible fault targets."""
        servers = ["store"] if self.rabbit is None else ["store", "rabbit"]
        names = self.http, [f"worker-{n}" for n in range(sum(WORKERS.values()))]
        return Targets(
            workers=names[1],
            routers=list(names[0]),
            servers=servers,
            cables=list(self.cables),
            clocks=list(self.clocks) or ["none"],
            replicated=self.rabbit is None,
        )


def orphans(notes: Path) -> list[int]:
    """Processes of callables that outlived the fleet with this notes file."""
    return [process.pid for process in psutil.process_iter() if _notes_file_of(process) == str(notes)]


def _notes_file_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(NOTES_FILE) if process.pid != os.getpid() else None
    except (psutil.Error, OSError):
        return None


@contextmanager
def running_fleet(folder: Path, *, rabbitmq: bool) -> Iterator[Fleet]:
    """A fleet that is ready; stopped afterwards."""
    store = Store(folder / "store", replicated=not rabbitmq)
    rabbit = RabbitServer(folder / "rabbitmq") if rabbitmq else None
    fleet = None
    try:
        store.start()
        if rabbit is not None:
            rabbit.start()
        fleet = _fleet(folder, store, rabbit)
        fleet.processes.start()
        _await_ready(fleet)
        yield fleet
    finally:
        if fleet is not None:
            fleet.processes.stop()
            for cable in fleet.cables.values():
                cable.close()
        if rabbit is not None:
            rabbit.stop()
        store.stop()


def _fleet(folder: Path, store: Store, rabbit: RabbitServer | None) -> Fleet:
    cables = {f"{side} to store": Cable("127.0.0.1", store.port) for side in _SIDES}
    amqp = dict.fromkeys(_SIDES, "")
    if rabbit is not None:
        cables |= {f"{side} to rabbit": Cable("127.0.0.1", rabbit.port) for side in _BRIDGED}
        amqp |= {side: through(rabbit.url, cables[f"{side} to rabbit"]) for side in _BRIDGED}
    secret = secrets.token_hex(32)

    def settings(side: str) -> Settings:
        variables = {"BROKER": through(store.primary.url, cables[f"{side} to store"]), "SECRET": secret}
        variables |= {"QUEUES": str(folder / "queues.yaml"), "MODELS": str(folder / "models")}
        return settings_from({f"TAXIWAY_{name}": value for name, value in variables.items()})

    (folder / "queues.yaml").write_text(QUEUES)
    (folder / "logs").mkdir()
    shutil.copytree(TREE / "tests" / "chaos" / "models", folder / "models")
    for name in ("echo", BATCH_MODEL):
        (folder / "models" / name).symlink_to(TREE / "models" / name)
    _write_graphs(folder / "models")
    notes, clocks = folder / "notes", _clocks(folder)
    ports = {f"router-{n}": kept_port(folder / f"router-{n}.port") for n in range(ROUTERS)}

    def process(name: str, arguments: list[str], side: str) -> SupervisedProcess:
        variables = {**os.environ, **settings(side).environment(), NOTES_FILE: str(notes), "OMP_NUM_THREADS": "1"}
        variables["TAXIWAY_AMQP"] = amqp[side]
        if name in clocks:
            variables |= _fake_time(clocks[name])
        return SupervisedProcess(name, arguments, variables, folder / "logs", announces=True)

    processes = {name: process(name, _router(port, folder / "files"), "routers") for name, port in ports.items()}
    classes = [name for name, count in WORKERS.items() for _ in range(count)]
    processes |= {f"worker-{n}": process(f"worker-{n}", _worker(c, n), "workers") for n, c in enumerate(classes)}
    http = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    producers = settings("producers"), amqp["producers"]
    return Fleet(store, rabbit, Processes(processes), cables, clocks, *producers, http, notes)


def _write_graphs(models: Path) -> None:
    """Harmful models that run inside the worker's process: one never ends, one needs more memory than there is."""
    number = [{"name": "number", "datatype": "INT64", "shape": [-1]}]
    graphs = {
        "spin": spinner_graph("number", "number-after", turns=2**40),
        "starve": hungry_graph("number", "number-after", numbers=2**34),
    }
    after = [{"name": "number-after", "datatype": "INT64", "shape": [-1]}]
    for name, graph in graphs.items():
        write_model(models, name, graph, inputs=number, outputs=after, variants={"onnx": onnx_variant(0.001)})


def _router(port: int, files: Path) -> list[str]:
    return ["-m", "api", "--port", str(port), "--files", str(files), "--log", "WARNING"]


def _worker(hardware_class: str, number: int) -> list[str]:
    device = f"cpu:{number % (psutil.cpu_count() or 1)}"
    return ["-m", "tests.chaos.worker", "--class", hardware_class, "--device", device, "--loglevel", "WARNING"]


def _clocks(folder: Path) -> dict[str, Path]:
    """The clock files of the processes whose time can be stepped; empty without libfaketime."""
    if find_faketime() is None:
        return {}
    clocks = {name: folder / f"{name}.clock" for name in ("router-0", "worker-0")}
    for clock in clocks.values():
        clock.write_text("+0")
    return clocks


def find_faketime() -> Path | None:
    """libfaketime's library for threaded programs (Debian: `faketime`)."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


def _fake_time(clock: Path) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(find_faketime()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _await_ready(fleet: Fleet) -> None:
    end = time.monotonic() + _START
    while not (fleet.processes.ready and all(map(_answers, fleet.http.values()))):
        if time.monotonic() > end:
            raise RuntimeError("the fleet did not become ready: see its logs")
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/ready", timeout=1, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
