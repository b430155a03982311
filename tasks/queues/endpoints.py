"""The `endpoint` of a hardware class in queues.yaml: an external server that runs models, such as vLLM. Pure."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal, get_args
from urllib.parse import urljoin, urlsplit

import msgspec

from tasks.document import Contradictions, Verbatim
from taxiway.contract.job import Tokens

EndpointProtocol = Literal["openai", "oip", "taxiway"]

PROTOCOLS: tuple[str, ...] = get_args(EndpointProtocol)
"""Protocols that endpoints speak. A variant whose runtime has such a name runs on endpoints, in-process on nothing."""

HOME = "home"
"""The label of all classes but those of other fleets, in a fleet that has such: what has it as locality stays here."""

Url = Annotated[str, msgspec.Meta(pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$", max_length=2048)]
HeaderName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$", max_length=128)]
HeaderValue = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=4096)]
Command = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
PerMinute = Annotated[float, msgspec.Meta(gt=0)]


class Tariff(msgspec.Struct, frozen=True, array_like=True):
    """US dollars for each token of input, of input that the endpoint had cached and of output, and for each request."""

    input: float
    cached: float
    output: float
    request: float

    @property
    def of_tokens(self) -> bool:
        """Whether tokens cost something."""
        return self.input + self.cached + self.output > 0

    def bill(self, tokens: Tokens, requests: int) -> float:
        """US dollars for requests with these tokens in total."""
        cached = min(tokens.cached, tokens.input)
        paid = self.input * (tokens.input - cached) + self.cached * cached + self.output * tokens.output
        return paid + self.request * requests


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files in PEM for TLS to an endpoint."""

    authorities: str | None = None
    """The authorities that may sign the server's certificate; not given: the system's. Example:
    /etc/ssl/fleet-ca.pem"""
    certificate: str | None = None
    """The certificate that the worker shows. Example: /etc/ssl/worker.pem"""
    key: str | None = None
    """The private key of `certificate`. Example: /etc/ssl/worker-key.pem"""


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Probes of an endpoint."""

    path: Annotated[str, msgspec.Meta(pattern=r"^(/|/?[^/\s#][^\s#]*)$", max_length=2048)] | None = None
    """What is asked with GET: with a slash first a path of the server, else one below the endpoint's URL; not given:
    the protocol's own. Example: /health"""
    every: Seconds = 1.0
    """Seconds between two probes."""

    def url(self, replica: str, usual: str) -> str:
        """What is asked of the replica with this URL; `usual` is the protocol's path below it."""
        if self.path is None:
            return replica + usual
        return urljoin(replica, self.path) if self.path.startswith("/") else f"{replica}/{self.path}"


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The most that one replica may be sent in a minute."""

    requests_per_minute: PerMinute | None = None
    """Requests; not given: no bound. Example: 60"""
    tokens_per_minute: PerMinute | None = None
    """Tokens of input and output; not given: no bound. Example: 90000"""


class ModelFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An artefact of a model.yaml, which is fetched as those of other models are."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    """The model's name. Example: chat"""
    artefact: Annotated[str, msgspec.Meta(min_length=1)]
    """The artefact's name in it. Example: weights"""


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a replica is started and stopped: exactly one of `command`, `llama` and `deployment`.

    In the command and in `ready`, `{host}` and `{port}` are those of the replica's URL; port 0 there is a free one.
    """

    command: Command | tuple[Command, ...] | None = None
    """A command of the worker's machine: a text, or a list of words. Example: vllm serve llama --port {port}"""
    llama: Command | ModelFile | None = None
    """A GGUF file that llama.cpp serves: relative to queues.yaml's folder, or an artefact of a model. Example: {model:
    chat, artefact: weights}"""
    ready: Annotated[str, msgspec.Meta(pattern=r"^https?://", max_length=2048)] | None = None
    """What answers with 200 once the engine serves; not given: what probes ask. Example: http://{host}:{port}/health"""
    deployment: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)] | None = None
    """The Kubernetes Deployment that an autoscaler scales by `/v1/scaling`. Example: vllm-llama"""

    @property
    def words(self) -> tuple[str, ...]:
        """The command's words."""
        if self.command is None:
            return ()
        return tuple(shlex.split(self.command)) if isinstance(self.command, str) else self.command


Name = Annotated[str, msgspec.Meta(min_length=1)]


class ServedVariant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model that the server has in one variant alone: Q4 here, FP16 there."""

    server: Name
    """What the server calls it. Example: llama-3.1-8b-q4"""
    variant: Name
    """The variant of its model.yaml. Example: q4"""


class Endpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A server that runs models, and its replicas."""

    # Where it is
    protocol: EndpointProtocol
    """What it speaks: OpenAI's API, the Open Inference Protocol, or `taxiway`, which is another fleet's HTTP API."""
    url: Url | Annotated[tuple[Url, ...], msgspec.Meta(min_length=1)] | None = None
    """Where the protocol's paths begin: of `openai` it usually ends in `/v1`, of the others it is the server's root.
    Several are replicas, each driven by a worker of its own. Required, but for a `peer`. Example:
    http://10.0.0.5:8000/v1"""
    peer: Name | None = None
    """In place of `url`, another fleet that cannot be reached and connects here: the tenant as which it does, or at an
    API without keys its `site`. Example: edge"""
    serves: Name | None = None
    """Of another fleet: that it may hand work to this one, too, over a connection that each router opens to it, and the
    tenant here that its work has. Example: cloud"""
    addresses: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    """How many of the addresses that each URL's name has are replicas; not given: the name is one. Example: 3"""
    slots: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    """Requests that one replica runs at the same time. Example: 32"""
    start: Start | None = None
    """How a replica is started and stopped; not given: it runs without us."""

    public_key: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    """The Ed25519 key of another fleet's site (`TAXIWAY_SITE_KEY` there), in hexadecimal digits: offers without its
    signature are refused; not given: they need none."""

    # What it serves
    models: dict[str, Name | ServedVariant] = {}
    """What the server calls each model, by name or `name:version`. Example: {chat: llama-3.1-8b}"""
    discover: bool = False
    """Whether models that the server announces are served without a model.yaml."""
    forwards: tuple[Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{1,40}$")], ...] = ()
    """Further fields of chats that are sent to it. Example: [chat_template_kwargs]"""
    priority: bool = False
    """Whether it goes by a request's field `priority`, the lowest first, as vLLM does with `--scheduling-policy
    priority`: it carries the job's level."""

    # How it is asked
    key_env: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """The environment variable of the worker that has the API key. Example: VLLM_KEY"""
    headers: dict[HeaderName, HeaderValue] = {}
    """Headers of each request. Example: {X-Team: search}"""
    tls: Tls = Tls()
    """Files for TLS."""
    connect_timeout: Seconds = 2.0
    """Seconds within which a connection must open."""
    health: Health = Health()
    """How it is probed."""
    rate: Rate = Rate()
    """The most that it may be sent; what its answers tell of that holds, too."""

    @property
    def is_peer(self) -> bool:
        """Whether it is another fleet."""
        return self.protocol == "taxiway"

    @property
    def urls(self) -> tuple[str, ...]:
        """Every replica's URL, without a slash at its end."""
        if self.url is None:
            return (f"peer://{self.peer}",)
        given = (self.url,) if isinstance(self.url, str) else self.url
        return tuple(url.rstrip("/") for url in given)

    @property
    def replicas(self) -> tuple[str, ...]:
        """Every replica: its URL, and with `addresses` which one of its name's, as `#0`, `#1` and so on."""
        if self.addresses is None:
            return self.urls
        return tuple(f"{url}#{index}" for url in self.urls for index in range(self.addresses))

    @property
    def starts(self) -> bool:
        """Whether what starts its worker on a machine starts the engine, too."""
        return self.start is not None and self.start.deployment is None

    @property
    def calls(self) -> dict[str, str]:
        """What the server calls each model."""
        return {name: one if isinstance(one, str) else one.server for name, one in self.models.items()}

    def name_of(self, name: str, version: int, variant: str) -> str | None:
        """What the server calls a model's variant; None if it does not serve it."""
        one = self.models.get(f"{name}:{version}", self.models.get(name))
        if isinstance(one, ServedVariant):
            return one.server if one.variant == variant else None
        return one


def _names_server(url: str) -> bool:
    """Whether the URL has a host, and its port, if it has one, is from 0 to 65535."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port >= 0)
    except ValueError:
        return False


def _start_contradictions(endpoint: Endpoint) -> Contradictions:
    start = endpoint.start
    if not endpoint.starts and endpoint.url is not None and any(urlsplit(url).port == 0 for url in endpoint.urls):
        yield "url", "a port other than 0, as nothing here starts the engine", endpoint.url
    if start is None:
        return
    given = [name for name in ("command", "llama", "deployment") if getattr(start, name) is not None]
    if len(given) != 1:
        yield "start", "one of command, llama and deployment", given
    try:
        _ = start.words
    except ValueError:
        yield "start.command", "quotes that close", start.command
    if start.llama is not None and endpoint.protocol != "openai":
        yield "protocol", "openai, which llama.cpp speaks", endpoint.protocol


def _of_fleets(endpoint: Endpoint) -> Contradictions:
    """Fields that only other fleets have, or only servers."""
    for name in ("peer", "serves", "public_key"):
        if not endpoint.is_peer and (given := getattr(endpoint, name)) is not None:
            yield name, f"nothing, as {endpoint.protocol} is no other fleet", given
    if endpoint.peer is not None and endpoint.serves is not None:
        yield "serves", "nothing, as this fleet does not connect to its peer", endpoint.serves
    if endpoint.is_peer and endpoint.discover:
        yield "discover", "false, as another fleet announces no tensors", endpoint.discover
    if endpoint.is_peer and endpoint.start is not None:
        yield "start", "nothing, as another fleet runs without us", Verbatim("a way to start it")


def _of_other_protocols(endpoint: Endpoint) -> Contradictions:
    """Fields that endpoints of the protocol do not have."""
    protocol = endpoint.protocol
    if protocol == "openai":
        return
    if endpoint.forwards:
        yield "forwards", f"nothing, as {protocol} has no chats", list(endpoint.forwards)
    if endpoint.rate.tokens_per_minute is not None:
        yield "rate.tokens_per_minute", f"nothing, as {protocol} counts no tokens", endpoint.rate.tokens_per_minute
    if endpoint.priority:
        yield "priority", f"false, as {protocol} has no such field", endpoint.priority


def contradictions(endpoint: Endpoint) -> Contradictions:
    """Contradictions between the endpoint's fields: path inside it, expectation and value of each."""
    tls = endpoint.tls
    if (endpoint.url is None) == (endpoint.peer is None):
        yield "url", "a URL, or the peer that connects here", endpoint.url
    wrong = [url for url in endpoint.urls if endpoint.url is not None and not _names_server(url)]
    if wrong:
        yield "url", "a host, and a port from 0 to 65535, in each URL", wrong[0]
        return
    if not endpoint.models and not endpoint.discover and endpoint.serves is None:
        yield "models", "a model, or discover: true", {}
    yield from _start_contradictions(endpoint)
    yield from _of_fleets(endpoint)
    yield from _of_other_protocols(endpoint)
    if tls.key is not None and tls.certificate is None:
        yield "tls.certificate", "the certificate of the key", None
    if tls != Tls() and not all(url.startswith("https:") for url in endpoint.urls):
        yield "url", "https:// where tls is given", endpoint.url
    if len(set(endpoint.urls)) < len(endpoint.urls):
        yield "url", "each replica once", endpoint.url
