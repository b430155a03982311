"""`taxiway join`: this machine serves a class of a fleet elsewhere, with that class's account at the broker.

Its worker takes queues.yaml from the broker, where the leading router publishes it, and nothing connects to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from tasks.queues.queues_file import PublishedQueues
from tasks.settings import Settings, settings_from
from tasks.topology import parse_topology
from taxiway.cli import MISSING, UNAVAILABLE, USAGE, CommandError
from taxiway.connection import ConnectionPool
from taxiway.contract.keys import QUEUES
from taxiway.release import release


def joined(url: str, hardware_class: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker that serves the class of the fleet whose broker has this address.

    Raises:
        SettingsError: the address, or the fleet's key in `environment`, is missing or wrong.
        BrokerUnavailableError: the broker does not answer, or refuses the account.
        CommandError: no router of a fleet is there, it is of another release, or it has no such class.
    """
    settings = settings_from({**environment, "TAXIWAY_BROKER": url})
    published = _published(settings)
    if published.release != release():
        raise CommandError(
            f"the fleet runs taxiway {published.release}, this machine has {release()}",
            hint="use the checkout or image of the fleet's version",
            code=MISSING,
        )
    topology = parse_topology(published.text)
    if hardware_class not in topology.hardware:
        expected = f"expected one of {', '.join(sorted(topology.hardware))}, got {hardware_class!r}"
        raise CommandError(f"--class: {expected}", hint="", code=USAGE)
    content = published.text.encode()
    file = settings.cache / "joined" / f"{hashlib.sha256(content).hexdigest()[:16]}.yaml"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.write_bytes(content)
    return settings.environment() | {"TAXIWAY_QUEUES": str(file), "TAXIWAY_JOINED": "1"}


def _published(settings: Settings) -> PublishedQueues:
    raw = ConnectionPool(settings.broker, server="broker").call("GET", QUEUES)
    if raw is None:
        raise CommandError(
            "no router has published a queues.yaml at this broker",
            hint="start a router of the fleet; it publishes within seconds",
            code=UNAVAILABLE,
        )
    return msgspec.json.decode(raw, type=PublishedQueues)
