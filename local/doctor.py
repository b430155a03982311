"""What `taxiway doctor` finds: this machine, its configuration, its endpoints and the fleet that runs here.

What is missing comes with how to get it. Each replica of an endpoint is asked for its models and for a token.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from local.embedded import EmbeddedValkeyError, find_binary
from local.fleet import LocalFleet, failing
from tasks.check import check_configuration
from tasks.machine import RUNTIMES, Machine
from tasks.models.catalogue import Catalogue
from tasks.models.discovered import Announced, discovered
from tasks.models.folder import APART, load_catalogue
from tasks.queues.endpoints import HOME, Endpoint
from tasks.settings import SettingsError, cache_directory, models_folder, queues_file
from tasks.topology import TopologyError, load_topology
from tasks.web import ask
from taxiway.cli.show import TELLING_JOBS
from taxiway.connection import ConnectionPool
from taxiway.contract.wire import refuses_account
from taxiway.errors import TaxiwayError
from taxiway.valkey import SCHEMES, ServerError
from workers.endpoints.http import EndpointConfigError, EndpointLink
from workers.endpoints.peers import Origin, open_link
from workers.endpoints.protocol import EndpointError, Exchange, ServedModel, open_protocol


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a fleet can use: what was found or, if it is missing, how to get it."""

    subject: str
    found: bool
    value: str
    remedy: str = ""


def finding(subject: str, value: str, *, found: bool = True, remedy: str = "") -> Finding:
    """What there is of a subject, or the remedy if it is missing or wrong."""
    return Finding(subject=subject, found=found, value=value, remedy="" if found else remedy)


def problem(subject: str, text: str, remedy: str) -> Finding:
    """Something that is missing or wrong."""
    return finding(subject, text, found=False, remedy=remedy)


TOKEN_WITHIN = 30.0
"""Seconds for one token: an engine may load its model first."""

_GENERATING = ("chat", "generation")  # pipelines whose models can be asked for a token

_CHAT = {"messages": [{"role": "user", "content": "Say one word."}], "max_tokens": 1, "temperature": 0}


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
            if urlsplit(replica).port != 0 and endpoint.url is not None  # known to a worker alone
        ]
        return [finding for findings in await asyncio.gather(*checks) for finding in findings]

    return asyncio.run(check_all())


async def _check_replica(
    subject: str, endpoint: Endpoint, replica: str, catalogue: Catalogue, environment: Mapping[str, str]
) -> list[Finding]:
    key = environment.get(endpoint.key_env or "", "")
    if endpoint.key_env and not key:
        return [problem(subject, f"{endpoint.key_env} is not set", f"put the API key into {endpoint.key_env}")]
    try:
        link = open_link(endpoint, replica, key, TOKEN_WITHIN, Origin("doctor", (), TOKEN_WITHIN, lambda _: None))
    except EndpointConfigError as error:
        return [problem(subject, str(error), "correct the paths in tls")]
    await link.open()
    try:
        return await _check_answers(subject, endpoint, link, catalogue)
    finally:
        await link.close()


async def _check_answers(subject: str, endpoint: Endpoint, link: EndpointLink, catalogue: Catalogue) -> list[Finding]:
    protocol = open_protocol(endpoint.protocol)
    try:
        body = await link.probe("", endpoint.connect_timeout, base=endpoint.health.url(link.url, protocol.HEALTH))
        listed = None if endpoint.health.path else protocol.announced(body)
    except EndpointError as error:
        return [problem(subject, error.reason, remedy(error.reason, endpoint))]
    names = None if listed is None else sorted(set(listed))
    answer = "answers" if names is None else f"answers, and lists {', '.join(names[:5]) or 'no model'}"
    served = {name: called for name, called in endpoint.calls.items() if names is None or called in names}
    return [
        finding(subject, answer),
        *_missing(subject, endpoint, served),
        *await _token(subject, endpoint, link, catalogue, served),
    ]


def _missing(subject: str, endpoint: Endpoint, served: Mapping[str, str]) -> Iterator[Finding]:
    for name, called in endpoint.calls.items():
        if name not in served:
            hint = f"correct endpoint.models.{name}, or load it there"
            yield problem(f"{subject} {name}", f"the endpoint lists no model {called!r}", hint)


async def _token(
    subject: str, endpoint: Endpoint, link: EndpointLink, catalogue: Catalogue, served: Mapping[str, str]
) -> list[Finding]:
    """Whether the first generating model that it serves answers with a token."""
    generating = (
        called
        for name, called in served.items()
        if catalogue.serves(name) and catalogue.resolve(name).pipeline in _GENERATING
    )
    called = next(generating, None) if endpoint.protocol == "openai" else None
    if called is None:
        return []
    model = discovered("doctor", endpoint.protocol, Announced())
    asked = ServedModel(model, model.variants[endpoint.protocol], called)
    item = open_protocol(endpoint.protocol).prepare(asked, {"request": dict(_CHAT)}, {"max_tokens": 1})
    subject, began = f"{subject} token", asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(TOKEN_WITHIN):
            await link.ask(Exchange(item.ask, item.size), lambda text: None)
    except EndpointError as error:
        return [problem(subject, error.reason, remedy(error.reason, endpoint))]
    except TaxiwayError as error:
        return [problem(subject, error.message, "see the server's log")]
    except TimeoutError:
        return [problem(subject, f"none within {TOKEN_WITHIN:g} s", "see the server's log")]
    seconds = asyncio.get_running_loop().time() - began
    return [finding(subject, f"{called} answers in {seconds:.2g} s")]


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
    made = Path(fleet.data) / "site.key" if fleet is not None else None
    signing = site_key(environment, made)
    return [*this, *configuration(environment), *signing, *check_endpoints(environment), *here]


def configuration(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Problems of queues.yaml and the models; one finding if there are none."""
    verdicts = check_configuration(queues_file(environment), models_folder(environment), environment)
    wrong = [verdict for verdict in verdicts if verdict.level != "ok"]
    for verdict in wrong:
        yield problem(verdict.subject, verdict.text, verdict.hint or "taxiway check")
    if not wrong:
        yield finding("queues.yaml and models", f"{len(verdicts) - 1} models are valid")


def site_key(environment: Mapping[str, str], made: Path | None) -> Iterator[Finding]:
    """Whether a fleet with labels or peers has a key that signs receipts: one that is named, else that of `taxiway up`.

    None of any other fleet, nor if queues.yaml is invalid.
    """
    from tasks.site_key import load_site_key, public_text  # others start 60 ms sooner without cryptography

    with suppress(TopologyError):
        hardware = load_topology(queues_file(environment)).hardware.values()
        if not any(one.is_peer or set(one.labels) - {HOME} for one in hardware):
            return
        path = environment.get("TAXIWAY_SITE_KEY") or made
        try:
            public = public_text(load_site_key(path)) if path else ""
            value = f"receipts can be verified with {public}" if public else "receipts of placements are not signed"
        except SettingsError as error:
            public, value = "", str(error)
        remedy = "openssl rand -hex 32 > site.key, and name it in TAXIWAY_SITE_KEY of the routers"
        yield finding("site key", value, found=bool(public), remedy=remedy)


def reported(fleet: LocalFleet, environment: Mapping[str, str]) -> list[Finding]:
    """The fleet's problems and how its placements held, by its router; if none answers, its processes' problems."""
    found = ask(f"{fleet.http}/v2/fleet", key=environment.get("TAXIWAY_KEY", ""), timeout=_ANSWER_WITHIN)
    with suppress(msgspec.DecodeError):
        view = msgspec.json.decode(found or b"", type=dict[str, Any])
        return [*(problem(**one) for one in view.get("problems", ())), *calibrations(view.get("classes", {}))]
    logs = {process.name: process.log for process in fleet.processes}
    return [problem(f"process {name}", why, f"see {logs[name]}") for name, why in failing(fleet).items()]


HELD, TAKEN = 0.95, 1 / 3
"""The least share of jobs that keep within "at most", and the least part of it that the median job takes."""


def calibrations(classes: Mapping[str, Any]) -> Iterator[Finding]:
    """How the placements' "at most" held on each class of a router's view that has ended enough jobs."""
    for name, facts in sorted(classes.items()):
        bounds = facts["bounds"]
        if bounds is None or bounds["jobs"] < TELLING_JOBS:
            continue
        jobs, held, taken = bounds["jobs"], bounds["held"], bounds["taken"]
        value = f"{held:.1%} of {jobs} jobs kept within, the median took {taken:.2f} of it"
        sound = held >= HELD and taken >= TAKEN
        remedy = f"expected {HELD:.0%} and {TAKEN:.2f}: measure the class again (taxiway profile)"
        yield finding(f"at most of {name}", value, found=sound, remedy=remedy)


def processes(fleet: LocalFleet) -> Finding:
    """How many processes of a running fleet are ready."""
    running = sum(process.ready for process in fleet.processes)
    value = f"{running} of {len(fleet.processes)} processes are ready; their logs are in {fleet.data}/logs"
    return finding("fleet here", value, found=running == len(fleet.processes))


def _hardware(machine: Machine) -> Iterator[Finding]:
    sets, cuda, chips = machine.instruction_sets, machine.cuda, machine.tpu_chips
    yield finding("cores", f"{machine.cores} physical")
    yield finding("memory", f"{_gib(machine.memory)}, {_gib(machine.memory_free)} of it available")
    faster = ", ".join(sets) or "none of those that make models faster"
    yield finding("instruction sets", faster, found=bool(sets))
    devices = ", ".join(cuda) or "no NVIDIA device with a driver"
    remedy = "serve its classes on the CPU: taxiway up --emulate CLASS"
    yield finding("CUDA", devices, found=bool(cuda), remedy=remedy)
    on_bus = f"{chips} chips" if chips else "no chip on the PCI bus"
    yield finding("TPU", on_bus, found=chips > 0, remedy=remedy)


def _runtimes(machine: Machine) -> Iterator[Finding]:
    for name, distribution in RUNTIMES.items():
        version = machine.runtimes.get(name)
        value = f"{distribution} {version}" if version else f"{distribution} is not installed"
        remedy = "make torch" if name == "torch" else "make setup"
        yield finding(f"runtime {name}", value, found=version is not None, remedy=remedy)


def check_servers(environment: Mapping[str, str]) -> None:
    """Check that the user's servers answer, if there are any. Invalid addresses are refused by `settings_from`.

    Raises:
        ServerAwayError: one does not; names its variable.
    """
    for variable in SERVERS:
        url = environment.get(variable, "")
        finding = _server(variable, url) if _scheme(url) in (*SCHEMES, *_PORTS) else None
        if finding is not None and not finding.found:
            raise ServerAwayError(f"{variable}: {finding.value}")


def servers(environment: Mapping[str, str]) -> Iterator[Finding]:
    """The embedded broker, and the user's own servers."""
    try:
        yield finding("embedded Valkey", str(find_binary()))
    except EmbeddedValkeyError as error:
        yield problem("embedded Valkey", str(error), "make setup")
    for variable, url in ((name, environment[name]) for name in SERVERS if environment.get(name)):
        scheme = _scheme(url)
        if not scheme:
            yield problem(variable, "not an address", f"correct {variable}, or unset it")
            continue
        yield _server(variable, url)
        if scheme not in _PORTS:
            yield from _guard(variable, url)
            for check in (partial(_disk, folder=None), _clock, partial(_replicas, environment=environment)):
                yield from _asked(check, variable, url)


def _scheme(url: str) -> str:
    """The address's scheme; empty if it cannot be read."""
    try:
        return urlsplit(url).scheme
    except ValueError:
        return ""


def _server(variable: str, url: str) -> Finding:
    """Whether the user's server answers; its address is shown without its password."""
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2] or parts.path}"
    try:
        _ping(url)
    except (OSError, ServerError, ValueError) as error:
        known = isinstance(error, ServerError) and refuses_account(error)
        remedy = f"correct the account in {variable}" if known else f"start the server, or unset {variable}"
        return problem(variable, f"{shown}: {error}", remedy)
    return finding(variable, f"{shown} answers")


def _guard(variable: str, url: str) -> Iterator[Finding]:
    """A finding if a Valkey or Redis server accepts clients without a password."""
    parts = urlsplit(url)
    anonymous = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    try:
        _ping(anonymous)
    except (OSError, ServerError, ValueError):
        return
    remedy = "give it a password (requirepass), or accounts: python -m broker.accounts --acl FILE"
    yield problem(f"{variable} guard", "accepts clients without a password", remedy)


def _store_here(fleet: LocalFleet, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What is on the disk of a local fleet's store, if that is none of the `SERVERS` that are named here."""
    if fleet.broker not in map(environment.get, SERVERS):
        embedded = any(process.name == "broker" for process in fleet.processes)
        disk = partial(_disk, folder=Path(fleet.data) if embedded else None)
        yield from _asked(disk, "state store", fleet.broker)


def _asked(check: Callable[[ConnectionPool, str], Iterator[Finding]], subject: str, url: str) -> Iterator[Finding]:
    """The findings of a check of a Valkey or Redis server; none if it does not answer, or the account may not ask."""
    with suppress(OSError, ServerError, ValueError), closing(ConnectionPool(url, answer=_ANSWER_WITHIN)) as connections:
        yield from check(connections, subject)


def _disk(connections: ConnectionPool, subject: str, folder: Path | None) -> Iterator[Finding]:
    """What the server keeps on its disk, if anything, and the free space if it keeps it in `folder`."""
    lines = connections.call("INFO", "persistence").decode().splitlines()
    free = None if folder is None else shutil.disk_usage(folder).free
    wrong = [text for status, text in _UNWRITTEN.items() if status in lines]
    size = _figure(lines, "aof_current_size")
    if wrong or size:
        room = "" if free is None else f", {_size(free)} free"
        value = "; ".join([*wrong, f"append-only file of {_size(size)}{room}"])
        found = not wrong and (free is None or free >= 2 * size)
        where = "on that server's disk" if folder is None else f"at {folder}"
        remedy = f"free space {where}: a rewrite of the file needs its size again"
        yield finding(f"{subject} disk", value, found=found, remedy=remedy)


def _clock(connections: ConnectionPool, subject: str) -> Iterator[Finding]:
    """A finding if this machine's clock differs from the server's."""
    seconds, microseconds = map(int, connections.call("TIME"))
    ahead = time.time() - seconds - microseconds / 1e6
    if abs(ahead) >= APART:
        value = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the state store's, which deadlines follow"
        yield problem(f"{subject} clock of this machine", value, "synchronise both machines (NTP)")


def _replicas(connections: ConnectionPool, subject: str, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What the server says of its replicas, where `limits.durability` counts on them."""
    with suppress(TopologyError):
        limits = load_topology(queues_file(environment)).limits
        if limits.confirmed_by:
            connected = _figure(connections.call("INFO", "replication").decode().splitlines(), "connected_slaves")
            least = int(connections.call("CONFIG", "GET", "min-replicas-to-write")[1])
            value = f"{connected} of {limits.replicas} replicas connected, min-replicas-to-write {least}"
            found = connected >= limits.replicas and least >= limits.confirmed_by
            remedy = f"connect the replicas, and set min-replicas-to-write {limits.confirmed_by} at each server"
            yield finding(f"{subject} replicas", value, found=found, remedy=remedy)


def _figure(lines: Sequence[str], name: str) -> int:
    """A figure in an answer to INFO; 0 if it is not there."""
    return next((int(line.partition(":")[2]) for line in lines if line.startswith(f"{name}:")), 0)


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
    held = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    yield finding("model cache", f"{cache}: {_gib(held)}", found=held > 0, remedy="python -m local fetch")
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    remedy = f"make room: about {_gib(_DISK)} is needed, or set TAXIWAY_CACHE"
    yield finding("free disk", f"{_gib(free)} at {there}", found=free >= _DISK, remedy=remedy)


def _size(size: int) -> str:
    return _gib(size) if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
