"""What this machine has, what is missing, and how to get it."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import msgspec

from local.doctor import Finding, problem
from local.doctor.endpoints import check_endpoints
from local.embedded import EmbeddedValkeyError, find_binary
from local.fleet import LocalFleet, failing
from tasks.check import check_configuration
from tasks.machine import RUNTIMES, Machine
from tasks.models.folder import APART
from tasks.settings import BROKERS, cache_directory, models_folder, queues_file
from tasks.topology import TopologyError, load_topology
from tasks.web import NO_ANSWER, ask
from taxiway.cli.show import TELLING_JOBS
from taxiway.connection import ConnectionPool
from taxiway.contract.wire import refuses_account
from taxiway.valkey import ServerError

_ANSWER_WITHIN = 2.0  # seconds for one look at a server
_PORTS = {"amqp": 5672, "amqps": 5671}
_DISK = 3 * 2**30  # bytes: the shipped models, their conversions and a torch for the CPU

_UNWRITTEN = {
    "aof_last_write_status:err": "cannot be written: the server refuses requests and heartbeats, and loses nothing",
    "rdb_last_bgsave_status:err": "the last snapshot could not be written: the server may refuse requests",
}
"""What lines of `INFO persistence` say of a server's disk."""

SERVERS = ("TAXIWAY_BROKER", "TAXIWAY_AMQP")
"""The variables that name the user's own servers."""


class ServerAwayError(Exception):
    """A server that the user named does not answer."""


def examine(machine: Machine, environment: Mapping[str, str], fleet: LocalFleet | None) -> list[Finding]:
    """The findings about this machine and its configuration, and about the `fleet` that runs here."""
    cache = cache_directory(environment)
    here = (
        [processes(fleet), *_store_here(fleet, environment), *reported(fleet, environment)] if fleet is not None else []
    )
    this = [*_hardware(machine), *_runtimes(machine), *servers(environment), *_storage(cache)]
    return [*this, *configuration(environment), *check_endpoints(environment), *here]


def configuration(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Problems of queues.yaml and the models; one finding if there are none."""
    verdicts = check_configuration(queues_file(environment), models_folder(environment), cache_directory(environment))
    wrong = [verdict for verdict in verdicts if verdict.level != "ok"]
    for verdict in wrong:
        yield Finding(subject=verdict.subject, found=False, value=verdict.text, remedy=verdict.hint or "taxiway check")
    if not wrong:
        yield Finding(subject="queues.yaml and models", found=True, value=f"{len(verdicts) - 1} models are valid")


def reported(fleet: LocalFleet, environment: Mapping[str, str]) -> list[Finding]:
    """The fleet's problems and how its placements held, by its router; if none answers, its processes' problems."""
    key = environment.get("TAXIWAY_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with suppress(*NO_ANSWER, msgspec.DecodeError):
        answer = ask(f"{fleet.http}/v2/fleet", headers=headers, timeout=_ANSWER_WITHIN)
        if answer.ok:
            view = msgspec.json.decode(answer.body, type=_Reported)
            return [*(problem(**one) for one in view.problems), *calibrations(view.classes)]
    logs = {process.name: process.log for process in fleet.processes}
    return [problem(f"process {name}", why, f"see {logs[name]}") for name, why in failing(fleet).items()]


class HeldBounds(msgspec.Struct):
    """How the placements' "at most" held on a class, as in a router's view."""

    jobs: int
    held: float
    taken: float


class ClassReport(msgspec.Struct):
    """The part of a class's view that tells how its placements held."""

    bounds: HeldBounds | None = None


HELD, TAKEN = 0.95, 1 / 3
"""The least share of jobs that keep within "at most", and the least part of it that the median job takes."""


def calibrations(classes: Mapping[str, ClassReport]) -> Iterator[Finding]:
    """How the placements' "at most" held on each class that has ended enough jobs."""
    for name, report in sorted(classes.items()):
        bounds = report.bounds
        if bounds is None or bounds.jobs < TELLING_JOBS:
            continue
        value = f"{bounds.held:.1%} of {bounds.jobs} jobs kept within, the median took {bounds.taken:.2f} of it"
        sound = bounds.held >= HELD and bounds.taken >= TAKEN
        remedy = "" if sound else f"expected {HELD:.0%} and {TAKEN:.2f}: measure the class again (taxiway profile)"
        yield Finding(subject=f"at most of {name}", found=sound, value=value, remedy=remedy)


class _Reported(msgspec.Struct):
    """The part of a router's view of the fleet that tells of its problems and of its placements."""

    problems: list[dict[str, str]] = []
    classes: dict[str, ClassReport] = {}


def _apart(subject: str, ahead: float) -> Finding:
    value = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the state store's, which deadlines follow"
    return problem(subject, value, "synchronise both machines (NTP)")


def processes(fleet: LocalFleet) -> Finding:
    """How many processes of a running fleet are ready."""
    running = sum(process.ready for process in fleet.processes)
    value = f"{running} of {len(fleet.processes)} processes are ready; their logs are in {fleet.data}/logs"
    return Finding(subject="fleet here", found=running == len(fleet.processes), value=value)


def _hardware(machine: Machine) -> Iterator[Finding]:
    yield Finding(subject="cores", found=True, value=f"{machine.cores} physical")
    yield Finding(
        subject="memory", found=True, value=f"{_gib(machine.memory)}, {_gib(machine.memory_free)} of it available"
    )
    yield Finding(
        subject="instruction sets",
        found=bool(machine.instruction_sets),
        value=", ".join(machine.instruction_sets) or "none of those that make models faster",
    )
    yield Finding(
        subject="CUDA",
        found=bool(machine.cuda),
        value=", ".join(machine.cuda) or "no NVIDIA device with a driver",
        remedy="" if machine.cuda else "serve gpu.realtime on the CPU: --emulate gpu.realtime",
    )
    yield Finding(
        subject="TPU",
        found=machine.tpu_chips > 0,
        value=f"{machine.tpu_chips} chips" if machine.tpu_chips else "no chip on the PCI bus",
        remedy="" if machine.tpu_chips else "serve tpu.bulk on the CPU: --emulate tpu.bulk",
    )


def _runtimes(machine: Machine) -> Iterator[Finding]:
    for name, distribution in RUNTIMES.items():
        version = machine.runtimes.get(name)
        remedy = "make torch" if name == "torch" else "make setup"
        yield Finding(
            subject=f"runtime {name}",
            found=version is not None,
            value=f"{distribution} {version}" if version else f"{distribution} is not installed",
            remedy="" if version else remedy,
        )


def check_servers(environment: Mapping[str, str]) -> None:
    """Check that the user's servers answer, if there are any. Invalid addresses are refused by `settings_from`.

    Raises:
        ServerAwayError: one does not; names its variable.
    """
    for variable in SERVERS:
        url = environment.get(variable, "")
        finding = _server(variable, url) if urlsplit(url).scheme in (*BROKERS, *_PORTS) else None
        if finding is not None and not finding.found:
            raise ServerAwayError(f"{variable}: {finding.value}")


def servers(environment: Mapping[str, str]) -> Iterator[Finding]:
    """The embedded broker, and the user's own servers."""
    try:
        yield Finding(subject="embedded Valkey", found=True, value=str(find_binary()))
    except EmbeddedValkeyError as error:
        yield Finding(subject="embedded Valkey", found=False, value=str(error), remedy="make setup")
    for variable in SERVERS:
        if environment.get(variable):
            yield _server(variable, environment[variable])
            yield from _guard(variable, environment[variable])
            yield from _disk(variable, environment[variable], None)
            yield from _clock(variable, environment[variable])
            yield from _replicas(variable, environment[variable], environment)


def _server(variable: str, url: str) -> Finding:
    """Whether the user's server answers; its address is shown without its password."""
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2] or parts.path}"
    try:
        _ping(url)
    except (OSError, ServerError, ValueError) as error:
        known = isinstance(error, ServerError) and refuses_account(error)
        remedy = f"correct the account in {variable}" if known else f"start the server, or unset {variable}"
        return Finding(subject=variable, found=False, value=f"{shown}: {error}", remedy=remedy)
    return Finding(subject=variable, found=True, value=f"{shown} answers")


def _guard(variable: str, url: str) -> Iterator[Finding]:
    """A finding if a Valkey or Redis server accepts clients without a password."""
    parts = urlsplit(url)
    if parts.scheme in _PORTS:
        return
    anonymous = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    try:
        _ping(anonymous)
    except (OSError, ServerError, ValueError):
        return
    remedy = "give it a password (requirepass), or accounts: python -m broker.accounts --acl FILE"
    yield Finding(subject=f"{variable} guard", found=False, value="accepts clients without a password", remedy=remedy)


def _store_here(fleet: LocalFleet, environment: Mapping[str, str]) -> Iterator[Finding]:
    """The same of the store of a local fleet that has none of the `SERVERS` that are named here."""
    if fleet.broker not in map(environment.get, SERVERS):
        embedded = any(process.name == "broker" for process in fleet.processes)
        yield from _disk("state store", fleet.broker, Path(fleet.data) if embedded else None)


def _disk(subject: str, url: str, folder: Path | None) -> Iterator[Finding]:
    """What a Valkey or Redis server keeps on its disk, and the free space if `folder` is there.

    None if the account may not ask, or the server keeps nothing.
    """
    if urlsplit(url).scheme in _PORTS:
        return
    with suppress(OSError, ServerError, ValueError), closing(ConnectionPool(url, answer=_ANSWER_WITHIN)) as connections:
        lines = connections.call("INFO", "persistence").decode().splitlines()
        free = None if folder is None else shutil.disk_usage(folder).free
        yield from _kept(f"{subject} disk", lines, free, "on that server's disk" if folder is None else f"at {folder}")


def _kept(subject: str, persistence: Sequence[str], free: int | None, where: str) -> Iterator[Finding]:
    wrong = [text for status, text in _UNWRITTEN.items() if status in persistence]
    size = next((int(line.partition(":")[2]) for line in persistence if line.startswith("aof_current_size:")), 0)
    room = "" if free is None else f", {_size(free)} free"
    found = not wrong and (free is None or free >= 2 * size)
    if wrong or size:
        value = "; ".join([*wrong, f"append-only file of {_size(size)}{room}"])
        remedy = "" if found else f"free space {where}: a rewrite of the file needs its size again"
        yield Finding(subject=subject, found=found, value=value, remedy=remedy)


def _clock(variable: str, url: str) -> Iterator[Finding]:
    """A finding if this machine's clock differs from that of a Valkey or Redis server."""
    if urlsplit(url).scheme in _PORTS:
        return
    with suppress(OSError, ServerError, ValueError), closing(ConnectionPool(url, answer=_ANSWER_WITHIN)) as connections:
        seconds, microseconds = map(int, connections.call("TIME"))
        ahead = time.time() - seconds - microseconds / 1e6
        if abs(ahead) >= APART:
            yield _apart(f"{variable} clock of this machine", ahead)


def _replicas(variable: str, url: str, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What a server says of its replicas, where `limits.durability` counts on them."""
    with (
        suppress(TopologyError, OSError, ServerError, ValueError),
        closing(ConnectionPool(url, answer=_ANSWER_WITHIN)) as asked,
    ):
        limits = load_topology(queues_file(environment)).limits
        if urlsplit(url).scheme in _PORTS or not limits.confirmed_by:
            return
        lines = asked.call("INFO", "replication").decode().splitlines()
        connected = next((int(line.partition(":")[2]) for line in lines if line.startswith("connected_slaves:")), 0)
        least = int(asked.call("CONFIG", "GET", "min-replicas-to-write")[1])
        value = f"{connected} of {limits.replicas} replicas connected, min-replicas-to-write {least}"
        found = connected >= limits.replicas and least >= limits.confirmed_by
        remedy = f"connect the replicas, and set min-replicas-to-write {limits.confirmed_by} at each server"
        yield Finding(subject=f"{variable} replicas", found=found, value=value, remedy="" if found else remedy)


def _ping(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme in _PORTS:
        socket.create_connection(
            (parts.hostname or "localhost", parts.port or _PORTS[parts.scheme]), _ANSWER_WITHIN
        ).close()
        return
    with closing(ConnectionPool(url, answer=_ANSWER_WITHIN)) as connections:
        connections.call("PING")


def _storage(cache: Path) -> Iterator[Finding]:
    files = [path for path in cache.rglob("*") if path.is_file()]
    held = sum(path.stat().st_size for path in files)
    yield Finding(
        subject="model cache",
        found=held > 0,
        value=f"{cache}: {_gib(held)}",
        remedy="" if held else "python -m local fetch",
    )
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    yield Finding(
        subject="free disk",
        found=free >= _DISK,
        value=f"{_gib(free)} at {there}",
        remedy="" if free >= _DISK else f"make room: about {_gib(_DISK)} is needed, or set TAXIWAY_CACHE",
    )


def _size(size: int) -> str:
    return _gib(size) if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
