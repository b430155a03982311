"""Asks each endpoint of queues.yaml for the doctor: whether it answers, lets us in, has its models, makes a token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tasks.endpoints import Endpoint
from tasks.models.catalogue import Catalogue
from tasks.models.discovered import Announced, discovered
from tasks.models.folder import load_catalogue
from tasks.settings import models_folder, queues_file
from tasks.topology import TopologyError, load_topology
from taxiway.errors import TaxiwayError
from workers.endpoints.http import EndpointConfigError, EndpointLink
from workers.endpoints.protocol import EndpointError, Exchange, open_protocol

PATIENCE = 30.0
"""Seconds for one token: an engine may load its model first."""

_SPOKEN = ("chat", "generation")  # pipelines whose models can be asked for a token
_CHAT = {"messages": [{"role": "user", "content": "Say one word."}], "max_tokens": 1, "temperature": 0}


class Looked(NamedTuple):
    """One look at an endpoint: what was looked at, whether all is well, what was seen, and what to do."""

    subject: str
    found: bool
    value: str
    remedy: str = ""


def look_at_endpoints(environment: Mapping[str, str]) -> list[Looked]:
    """What each replica of each endpoint answers now. Nothing of a queues.yaml that is invalid."""
    try:
        topology = load_topology(queues_file(environment))
    except TopologyError:
        return []
    catalogue = load_catalogue(models_folder(environment))
    found = [(name, one.endpoint) for name, one in topology.hardware.items() if one.endpoint is not None]

    async def look() -> list[Looked]:
        looks = [
            _look(f"{name} {replica}", endpoint, replica, catalogue, environment)
            for name, endpoint in found
            for replica in endpoint.replicas
        ]
        return [one for looked in await asyncio.gather(*looks) for one in looked]

    return asyncio.run(look())


async def _look(
    subject: str, endpoint: Endpoint, replica: str, catalogue: Catalogue, environment: Mapping[str, str]
) -> list[Looked]:
    key = environment.get(endpoint.key_env or "", "")
    if endpoint.key_env and not key:
        return [Looked(subject, False, f"{endpoint.key_env} is not set", f"put the API key into {endpoint.key_env}")]
    try:
        link = EndpointLink(endpoint, replica, key, PATIENCE)
    except EndpointConfigError as error:
        return [Looked(subject, False, str(error), "correct the paths in tls")]
    await link.open()
    try:
        return await _asked(subject, endpoint, link, catalogue)
    finally:
        await link.close()


async def _asked(subject: str, endpoint: Endpoint, link: EndpointLink, catalogue: Catalogue) -> list[Looked]:
    protocol = open_protocol(endpoint.protocol)
    try:
        body = await link.probe(endpoint.health.path or protocol.HEALTH, endpoint.connect_timeout)
        listed = None if endpoint.health.path else protocol.announced(body)
    except EndpointError as error:
        return [Looked(subject, False, error.reason, remedy(error.reason, endpoint))]
    told = "answers" if listed is None else f"answers, and lists {', '.join(sorted(listed)[:5]) or 'no model'}"
    return [
        Looked(subject, True, told),
        *_missing(subject, endpoint, listed),
        *await _token(subject, endpoint, link, catalogue),
    ]


def _missing(subject: str, endpoint: Endpoint, listed: object) -> Iterator[Looked]:
    for name, called in endpoint.models.items():
        if isinstance(listed, list) and called not in listed:
            hint = f"correct endpoint.models.{name}, or load it there"
            yield Looked(f"{subject} {name}", False, f"the endpoint lists no model {called!r}", hint)


async def _token(subject: str, endpoint: Endpoint, link: EndpointLink, catalogue: Catalogue) -> list[Looked]:
    """One token of the first model that speaks."""
    speaks = (
        called
        for name, called in endpoint.models.items()
        if catalogue.serves(name) and catalogue.resolve(name).pipeline in _SPOKEN
    )
    called = next(speaks, None) if endpoint.protocol == "openai" else None
    if called is None:
        return []
    model = discovered("doctor", endpoint.protocol, Announced())
    variant = model.variants[endpoint.protocol]
    item = open_protocol(endpoint.protocol).prepare(model, variant, called, {"request": dict(_CHAT)}, {"max_tokens": 1})
    assert item.ask is not None
    began = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(PATIENCE):
            await link.ask(Exchange(item.ask, item.size), lambda text: None)
    except EndpointError as error:
        return [Looked(f"{subject} token", False, error.reason, remedy(error.reason, endpoint))]
    except TaxiwayError as error:
        return [Looked(f"{subject} token", False, error.message, "see the server's log")]
    except TimeoutError:
        return [Looked(f"{subject} token", False, f"none within {PATIENCE:g} s", "see the server's log")]
    return [Looked(f"{subject} token", True, f"{called} answers in {asyncio.get_running_loop().time() - began:.2g} s")]


def remedy(reason: str, endpoint: Endpoint) -> str:
    """What to do about an endpoint that does not serve, by its reason."""
    where = f"the key in {endpoint.key_env}" if endpoint.key_env else "a key: name its variable in endpoint.key_env"
    hints = {
        "TLS": "correct tls.authorities, or the server's certificate",
        "cannot connect": "start the server, or correct endpoint.url",
        "no connection": "start the server, correct endpoint.url, or open the way to it",
        ": 401": f"the server wants {where}",
        ": 403": f"the server wants {where}",
        ": 404": "correct endpoint.url: with protocol openai it usually ends in /v1",
        "malformed": "correct endpoint.protocol or endpoint.url",
    }
    return next((hint for mark, hint in hints.items() if mark in reason), "see the server's log")
