"""Two fleets of real processes: a far one, and a near one that hands work to it over a line that can be cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

import taxiway
from tasks.settings import TREE, Settings
from taxiway.contract.peers import Outbox, ToCaller, ToSite, encode_frames
from tests.builders import recorded
from tests.cable import Cable
from tests.routing import RouterProcess, eventually, router_process
from tests.stored import facts_of
from tests.working import WorkerProcess, add_slow, empty_fleet, worker_process, worker_settings

PEER = "cloud"
"""The class of the near fleet that is the far one."""

FAR = recorded("fleets/far.yaml")

NEAR = recorded("fleets/near.yaml")


@dataclass(frozen=True)
class OpenSite:
    """A fleet that runs, and a client of its router."""

    settings: Settings
    router: RouterProcess
    client: taxiway.Client
    state: redis.Redis

    @property
    def url(self) -> str:
        """Of its HTTP API."""
        return self.router.http


@dataclass(frozen=True)
class TwoSites:
    """A near and a far fleet, the line between them, and the worker of the near one that is at its end."""

    near: OpenSite
    far: OpenSite
    line: Cable
    peer: WorkerProcess

    def facts(self) -> Any:
        """What the near fleet knows of the far one."""
        endpoint = facts_of(self.near.state, self.peer.name).endpoint
        return None if endpoint is None else endpoint.peer

    def offered(self) -> bool:
        """Whether the far fleet offers something."""
        facts = self.facts()
        return facts is not None and bool(facts.offers)


def messages(*frames: ToSite | ToCaller) -> Iterator[bytes]:
    """Frames as they are sent."""
    out = Outbox()
    for frame in frames:
        out.put(encode_frames(frame), getattr(frame, "key", ""))
    return out.messages()


@contextmanager
def open_fleet(
    valkey_url: str,
    folder: Path,
    queues: str,
    *classes: str,
    options: tuple[str, ...] = (),
    lasting: bool = False,
    seals: tuple[bytes, ...] = (),
    opening: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[OpenSite, dict[str, WorkerProcess]]]:
    """A fleet with one worker for each of these classes; the workers have these keys, and its router if `opening`."""
    folder.mkdir()
    settings = replace(worker_settings(empty_fleet(valkey_url, lasting=lasting), folder, queues), seals=seals)
    (settings.models / "chat").symlink_to(TREE / "models" / "chat")
    add_slow(settings.models, base=0.05)
    with ExitStack() as stack:
        logs = {name: stack.enter_context((folder / f"{name}.log").open("wb")) for name in ("router", *classes)}
        workers = {
            name: stack.enter_context(worker_process(settings, "--class", name, log=logs[name])) for name in classes
        }
        own = settings if opening else replace(settings, seals=())
        router = stack.enter_context(router_process(own, logs["router"], options, environment=environment))
        client = stack.enter_context(taxiway.Client(router.http))
        state = stack.enter_context(redis.Redis.from_url(settings.broker))
        yield OpenSite(settings, router, client, state), workers


@contextmanager
def line_to(url: str) -> Iterator[Cable]:
    """A line to a router."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    line = Cable(parts.hostname, parts.port)
    try:
        yield line
    finally:
        line.close()


SERVED = """
  near:
    device: endpoint
    endpoint: {protocol: taxiway, url: "URL", slots: 1, serves: edge}
service:"""
"""Of a far fleet that opens the connection on which the near one hands it work."""


ENGINE = """
  engine:
    device: endpoint
    labels: LABELS
    endpoint: {protocol: openai, url: "URL", slots: 4, models: {chat: served}, health: {every: 0.2}}
    price: {usd_per_hour: 1}
service:"""


def with_engine(queues: str, url: str, labels: str = "[]") -> str:
    """A fleet with a class that is an engine."""
    return queues.replace("service:", ENGINE.replace("URL", url).replace("LABELS", labels), 1)


@contextmanager
def served_sites(
    valkey_url: str, folder: Path, *near: str, queues: str = NEAR, lasting: bool = False
) -> Iterator[TwoSites]:
    """As `two_sites`, but the far one cannot be reached, and connects to the near one itself."""
    folder.mkdir(exist_ok=True)
    queues = queues.replace('url: "URL"', "peer: cloud")
    with ExitStack() as stack:
        here, workers = stack.enter_context(
            open_fleet(valkey_url, folder / "near", queues, PEER, *near, lasting=lasting)
        )
        line = stack.enter_context(line_to(here.url))
        far = FAR.replace("service:", SERVED.replace("URL", f"http://127.0.0.1:{line.port}"), 1)
        there, _ = stack.enter_context(open_fleet(valkey_url, folder / "far", far, "cpu.batch", lasting=lasting))
        eventually(lambda: _placed(here) == PEER)
        yield TwoSites(here, there, line, workers[PEER])


def _placed(site: OpenSite) -> str | None:
    """Where a site would place a job; None if nowhere."""
    placed: str | None = site.client.what_if("slab", {"samples": [4], "seed": [3]})["hardware_class"]
    return placed


@contextmanager
def two_sites(
    valkey_url: str,
    folder: Path,
    *near: str,
    far: str = FAR,
    queues: str = NEAR,
    classes: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    lasting: bool = False,
    seals: tuple[bytes, ...] = (),
) -> Iterator[TwoSites]:
    """Both fleets, once the far one has made offers, with workers of these further `classes` there, and of `near`.

    `lasting`: they live through the tests of a module. `seals` are the keys of all but the far router.
    """
    folder.mkdir(exist_ok=True)
    both: Any = {"lasting": lasting, "seals": seals}
    far_classes = ("cpu.batch", *classes)
    with ExitStack() as stack:
        there, _ = stack.enter_context(
            open_fleet(valkey_url, folder / "far", far, *far_classes, options=options, opening=False, **both)
        )
        line = stack.enter_context(line_to(there.url))
        queues = queues.replace("URL", f"http://127.0.0.1:{line.port}")
        here, workers = stack.enter_context(open_fleet(valkey_url, folder / "near", queues, PEER, *near, **both))
        sites = TwoSites(here, there, line, workers[PEER])
        eventually(sites.offered)
        yield sites
