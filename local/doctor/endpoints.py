"""Checks the endpoints of queues.yaml: whether each replica answers, lists its models and generates a token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from local.doctor import Finding, finding, problem
from tasks.models.catalogue import Catalogue
from tasks.models.discovered import Announced, discovered
from tasks.models.folder import load_catalogue
from tasks.queues.endpoints import Endpoint
from tasks.settings import models_folder, queues_file
from tasks.topology import TopologyError, load_topology
from taxiway.errors import TaxiwayError
from workers.endpoints.http import EndpointConfigError, EndpointLink
from workers.endpoints.peers import Origin, open_link
from workers.endpoints.protocol import EndpointError, Exchange, ServedModel, open_protocol

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
    assert item.ask is not None
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
