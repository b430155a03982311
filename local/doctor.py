"""What this machine has, what is missing, and how to get it; model weights are fetched here, with their progress."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import httpx
import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from local.embedded import EmbeddedValkeyError, find_binary
from local.up import Fleet, ProcessState
from tasks.check import check_configuration
from tasks.endpoints import Endpoint
from tasks.machine import RUNTIMES, Machine
from tasks.models.artefacts import ArtefactError, ArtefactStore
from tasks.models.catalogue import Catalogue
from tasks.models.discovered import Announced, discovered
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.settings import BROKERS, cache_directory, models_folder, queues_file
from tasks.topology import Topology, TopologyError, load_topology
from taxiway.connection import ConnectionPool
from taxiway.errors import TaxiwayError
from taxiway.valkey import ServerError
from workers.endpoints.http import EndpointConfigError, EndpointLink
from workers.endpoints.protocol import EndpointError, Exchange, open_protocol

_QUICK = 2.0  # seconds for one look at a server
_PORTS = {"amqp": 5672, "amqps": 5671}
_DISK = 3 * 2**30  # bytes: the shipped models, their conversions and a torch for the CPU


SERVERS = ("TAXIWAY_BROKER", "TAXIWAY_STATE")
"""The variables that name the user's own servers."""

PATIENCE = 30.0
"""Seconds for one token: an engine may load its model first."""

_GENERATING = ("chat", "generation")  # pipelines whose models can be asked for a token
_CHAT = {"messages": [{"role": "user", "content": "Say one word."}], "max_tokens": 1, "temperature": 0}


class ServerAwayError(Exception):
    """A server that the user named does not answer."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a fleet can use: what was found or, if it is missing, how to get it."""

    subject: str
    found: bool
    value: str
    remedy: str = ""


def examine(machine: Machine, environment: Mapping[str, str], fleet: Fleet | None) -> list[Finding]:
    """The findings about this machine and its configuration, and about the `fleet` that runs here."""
    cache = cache_directory(environment)
    here = [*processes(fleet), *outdated(fleet, environment)] if fleet is not None else []
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


def outdated(fleet: Fleet, environment: Mapping[str, str]) -> Iterator[Finding]:
    """The running processes that use an older queues.yaml, as far as the fleet's router knows."""
    key = environment.get("TAXIWAY_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with suppress(httpx.HTTPError, msgspec.DecodeError):
        answer = httpx.get(f"{fleet.http}/v2/fleet", headers=headers, timeout=_QUICK, trust_env=False)
        if answer.status_code != httpx.codes.OK:
            return
        for process in msgspec.json.decode(answer.content, type=_Restart).restart:
            value = "uses the queues.yaml that it started with, which has changed since"
            yield Finding(subject=f"process {process}", found=False, value=value, remedy="restart it")


class _Restart(msgspec.Struct):
    """The part of a router's view of the fleet that names processes with an older queues.yaml."""

    restart: tuple[str, ...] = ()


def processes(fleet: Fleet) -> Iterator[Finding]:
    """The processes of a running fleet: those that failed or are not running, each with its reason."""
    running = sum(process.ready for process in fleet.processes)
    yield Finding(subject="fleet here", found=True, value=f"{running} of {len(fleet.processes)} processes are ready")
    for process in fleet.processes:
        if process.restarts or not process.ready:
            yield _failing(process)


def _failing(process: ProcessState) -> Finding:
    state = "ready" if process.ready else "starting" if process.pid else "waits to be restarted"
    parts = [f"{state}, {process.restarts} {'restart' if process.restarts == 1 else 'restarts'}"]
    if process.last_exit is not None:
        at = datetime.fromtimestamp(process.last_exit.at).strftime("%H:%M:%S")
        parts += [f"at {at} {process.last_exit.why}", process.last_exit.last_line]
    value = ": ".join(filter(None, parts))
    return Finding(subject=f"process {process.name}", found=process.ready, value=value, remedy=f"see {process.log}")


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
        finding = _server(variable, url) if urlsplit(url).scheme in BROKERS else None
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


def _server(variable: str, url: str) -> Finding:
    """Whether the user's server answers; its address is shown without its password."""
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2] or parts.path}"
    try:
        _ping(url)
    except (OSError, ServerError, ValueError) as error:
        return Finding(
            subject=variable, found=False, value=f"{shown}: {error}", remedy=f"start the server, or unset {variable}"
        )
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


def _ping(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme in _PORTS:
        socket.create_connection((parts.hostname or "localhost", parts.port or _PORTS[parts.scheme]), _QUICK).close()
        return
    with closing(ConnectionPool(url, answer=_QUICK)) as connections:
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


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


Wanted = tuple[Model, str]
"""A model and the name of one of its artefacts."""


def for_runtimes(models: Iterable[Model], runtimes: Collection[str]) -> list[Wanted]:
    """The artefacts of every variant that one of the runtimes can run, each once."""
    wanted: dict[tuple[str, str], Wanted] = {}
    for model in models:
        for variant in model.variants.values():
            if variant.runtime in runtimes:
                wanted |= {(model.id, name): (model, name) for name in variant.artefacts.values()}
    return list(wanted.values())


def runtimes_of(topology: Topology, classes: Collection[str], installed: Collection[str]) -> set[str]:
    """The `installed` runtimes that workers of these classes use."""
    used: set[str] = {runtime for name in classes for runtime in topology.hardware[name].runtimes}
    return used & set(installed)


def fetch(wanted: Iterable[Wanted], cache: Path, console: Console) -> list[ArtefactError]:
    """Fetch or convert artefacts that the cache lacks, showing each on `console`; cached ones are only verified.

    Returns:
        The errors of the artefacts that could not be fetched; the others are fetched regardless.
    """
    failed = []
    store = ArtefactStore(cache)
    columns = (TextColumn("{task.description}"), BarColumn(), _SizeColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        show = _shown_on(bars)
        for model, name in wanted:
            try:
                store.path(model, name, show)
            except ArtefactError as error:
                failed.append(error)
    return failed


class _SizeColumn(DownloadColumn):
    """The bytes that are there; empty before the first: a conversion says its size at its end."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.completed else Text()


def _shown_on(bars: Progress) -> Callable[[str, int, int | None], None]:
    rows: dict[str, TaskID] = {}

    def show(description: str, done: int, total: int | None) -> None:
        if description not in rows:
            rows[description] = bars.add_task(description, total=None)
        bars.update(rows[description], completed=done, total=total)

    return show


def check_endpoints(environment: Mapping[str, str]) -> list[Finding]:
    """Findings about each replica of each endpoint; none if queues.yaml is invalid."""
    try:
        topology = load_topology(queues_file(environment))
    except TopologyError:
        return []
    catalogue = load_catalogue(models_folder(environment))
    found = [(name, one.endpoint) for name, one in topology.hardware.items() if one.endpoint is not None]

    async def check_all() -> list[Finding]:
        checks = [
            _check_replica(f"endpoint {name} {replica}", endpoint, replica, catalogue, environment)
            for name, endpoint in found
            for replica in endpoint.replicas
        ]
        return [finding for findings in await asyncio.gather(*checks) for finding in findings]

    return asyncio.run(check_all())


async def _check_replica(
    subject: str, endpoint: Endpoint, replica: str, catalogue: Catalogue, environment: Mapping[str, str]
) -> list[Finding]:
    key = environment.get(endpoint.key_env or "", "")
    if endpoint.key_env and not key:
        return [_problem(subject, f"{endpoint.key_env} is not set", f"put the API key into {endpoint.key_env}")]
    try:
        link = EndpointLink(endpoint, replica, key, PATIENCE)
    except EndpointConfigError as error:
        return [_problem(subject, str(error), "correct the paths in tls")]
    await link.open()
    try:
        return await _check_answers(subject, endpoint, link, catalogue)
    finally:
        await link.close()


def _problem(subject: str, value: str, remedy: str) -> Finding:
    return Finding(subject=subject, found=False, value=value, remedy=remedy)


async def _check_answers(subject: str, endpoint: Endpoint, link: EndpointLink, catalogue: Catalogue) -> list[Finding]:
    protocol = open_protocol(endpoint.protocol)
    try:
        body = await link.probe(endpoint.health.path or protocol.HEALTH, endpoint.connect_timeout)
        listed = None if endpoint.health.path else protocol.announced(body)
    except EndpointError as error:
        return [_problem(subject, error.reason, remedy(error.reason, endpoint))]
    answer = "answers" if listed is None else f"answers, and lists {', '.join(sorted(listed)[:5]) or 'no model'}"
    return [
        Finding(subject=subject, found=True, value=answer),
        *_missing(subject, endpoint, listed),
        *await _token(subject, endpoint, link, catalogue),
    ]


def _missing(subject: str, endpoint: Endpoint, listed: object) -> Iterator[Finding]:
    for name, called in endpoint.models.items():
        if isinstance(listed, list) and called not in listed:
            hint = f"correct endpoint.models.{name}, or load it there"
            yield _problem(f"{subject} {name}", f"the endpoint lists no model {called!r}", hint)


async def _token(subject: str, endpoint: Endpoint, link: EndpointLink, catalogue: Catalogue) -> list[Finding]:
    """Whether the first generating model answers with a token."""
    generating = (
        called
        for name, called in endpoint.models.items()
        if catalogue.serves(name) and catalogue.resolve(name).pipeline in _GENERATING
    )
    called = next(generating, None) if endpoint.protocol == "openai" else None
    if called is None:
        return []
    model = discovered("doctor", endpoint.protocol, Announced())
    variant = model.variants[endpoint.protocol]
    item = open_protocol(endpoint.protocol).prepare(model, variant, called, {"request": dict(_CHAT)}, {"max_tokens": 1})
    assert item.ask is not None
    subject, began = f"{subject} token", asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(PATIENCE):
            await link.ask(Exchange(item.ask, item.size), lambda text: None)
    except EndpointError as error:
        return [_problem(subject, error.reason, remedy(error.reason, endpoint))]
    except TaxiwayError as error:
        return [_problem(subject, error.message, "see the server's log")]
    except TimeoutError:
        return [_problem(subject, f"none within {PATIENCE:g} s", "see the server's log")]
    seconds = asyncio.get_running_loop().time() - began
    return [Finding(subject=subject, found=True, value=f"{called} answers in {seconds:.2g} s")]


def remedy(reason: str, endpoint: Endpoint) -> str:
    """What to do about an endpoint that does not serve, by the reason."""
    where = f"the key in {endpoint.key_env}" if endpoint.key_env else "a key: name its variable in endpoint.key_env"
    hints = {
        "TLS": "correct tls.authorities, or the server's certificate",
        "cannot connect": "start the server, or correct endpoint.url",
        "no connection": "start the server, correct endpoint.url, or open the network path to it",
        ": 401": f"the server requires {where}",
        ": 403": f"the server requires {where}",
        ": 404": "correct endpoint.url: with protocol openai it usually ends in /v1",
        "malformed": "correct endpoint.protocol or endpoint.url",
    }
    return next((hint for mark, hint in hints.items() if mark in reason), "see the server's log")
