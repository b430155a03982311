"""Where an endpoint's requests go, and whether it gets work now: by probes, its engine's report and pauses it asks for.

Sources: vLLM, docs/usage/metrics.md; SGLang, references/production_metrics; llama.cpp, tools/server/README.md; TGI,
reference/metrics; Triton, user_guide/metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tasks.heartbeat import EngineLoad, PeerFacts
from tasks.models.discovered import Announced
from tasks.queues.endpoints import Endpoint, connection
from taxiway.errors import UNREADABLE
from workers.decide.faults import Breaker, State
from workers.device import Device, DeviceMissingError, endpoint_device
from workers.endpoints.http import EndpointConfigError, EndpointLink
from workers.endpoints.peers import Origin, open_link
from workers.endpoints.protocol import EndpointError, EndpointProtocol, FaultKind
from workers.endpoints.variants import EndpointVariants

logger = logging.getLogger(__name__)

DISCOVER_EVERY = 10.0
"""Seconds between two looks for models of an endpoint whose probe lists none."""

ASK_AGAIN = 60.0
"""Seconds until an endpoint without figures of its engine is asked again."""

SHORTEST_PAUSE = 0.1
"""Seconds for which no request is sent, at least, after one for which the endpoint had no capacity."""


class EndpointHealth:
    """One endpoint's. For its event loop; any thread may read `fault`, `pause` and `slots`.

    `probed` is set after the first probe. `listed` are the models that the last one announced, None if it listed none,
    and `models` those that are served without a model.yaml, by what the server calls them. `extensions` are those that
    the server announces.

    Args:
        changed: called after each change of `slots`.
        announced: called with this after each probe that succeeded.
    """

    def __init__(
        self,
        link: EndpointLink,
        protocol: EndpointProtocol,
        endpoint: Endpoint,
        changed: Callable[[], None],
        announced: Callable[[EndpointHealth], None],
    ) -> None:
        self._link, self._protocol, self._announced = link, protocol, announced
        self.listed: Sequence[str] | None = None
        self.models: Mapping[str, Announced] = {}
        self.extensions: Collection[str] = ()
        self._discovers, self._discover_at = endpoint.discover, -math.inf
        self._asked = endpoint.health.url(link.url, protocol.HEALTH)
        self._lists = endpoint.health.path is None
        self._every, self._timeout = endpoint.health.every, endpoint.connect_timeout
        self._slots, self._changed = endpoint.slots, changed
        self._breaker = Breaker()
        self._missed = False
        self._paused_until = self._mute_until = 0.0
        self.engine: EngineLoad | None = None
        self._now = asyncio.Event()
        self.probed = asyncio.Event()
        self._failing: set[str] = set()

    @property
    def fault(self) -> str:
        """Why the endpoint gets no work, though it did not ask for a pause; empty if it gets some."""
        return self._breaker.reason

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """The state of its circuit breaker."""
        return self._breaker.state.value

    @property
    def pause(self) -> float:
        """Seconds for which the endpoint asked to be left alone."""
        return max(self._paused_until - time.monotonic(), 0.0)

    @property
    def slots(self) -> int:
        """How many rows may run on the endpoint now."""
        return 0 if self.pause else self._breaker.slots(self._slots)

    def resize(self, slots: int) -> None:
        """Set the number of the endpoint's slots."""
        self._slots = slots
        self._changed()

    def check(self) -> None:
        """Raise `EndpointError` if nothing may be sent now."""
        if self._breaker.state is State.OPEN:
            raise EndpointError(FaultKind.UNREACHED, self._breaker.reason)
        if self.pause:
            raise EndpointError(FaultKind.BUSY, "the endpoint is busy", self.pause)

    def answered(self) -> None:
        """Note that the endpoint answered a request, or refused it for its own fault."""
        self._failing.clear()
        self._set(self._breaker.answered())

    def failed(self, error: EndpointError, job: str) -> None:
        """Note a failed request of a job; unless the endpoint was only busy, a probe is sent at once.

        A job that fails again and again counts once: that may be the job's fault.
        """
        now = time.monotonic()
        if error.kind is FaultKind.BUSY:
            self._paused_until = max(self._paused_until, now + max(error.retry_after, SHORTEST_PAUSE))
            asyncio.get_running_loop().call_at(self._paused_until, self._changed)
            return
        if error.kind is FaultKind.STARTING:
            self._set(self._breaker.starting(error.reason, now))
        elif error.kind is FaultKind.UNREACHED:
            self._set(self._breaker.unreached(error.reason, now))
        elif job not in self._failing or self._breaker.state is State.HALF_OPEN:
            self._failing.add(job)
            self._set(self._breaker.failed(error.reason, now))
        self._now.set()

    async def run(self) -> None:
        """Send probes until cancelled."""
        while True:
            await self.probe()
            self.probed.set()
            now = time.monotonic()
            opened = self._breaker.state is State.OPEN
            due = self._breaker.probe_at if opened else now if self._missed else now + self._every
            self._now.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(due - now, 0.0)):
                    await self._now.wait()
            if self._breaker.state is State.OPEN:  # opened meanwhile: its own pause counts
                await asyncio.sleep(max(self._breaker.probe_at - time.monotonic(), 0.0))

    async def probe(self) -> None:
        """Send one probe, and note what it tells."""
        began = time.monotonic()
        try:
            body = await self._link.probe("", self._timeout, base=self._asked)
            listed = self._protocol.announced(body) if self._lists else None
            if listed != self.listed or began >= self._discover_at:
                self.extensions = await self._extensions(body if self._lists else b"")
                if self._discovers:
                    self.models = await self._link.converse(self._protocol.discover(), self._timeout)
                self._discover_at = time.monotonic() + DISCOVER_EVERY
            self.listed = listed
            self._announced(self)
        except EndpointError as error:
            if self._link.received <= began:  # else it answers others, and is only slow to answer this
                self._miss(error)
        else:
            self._missed = False
            self._set(self._breaker.probed())
            full = is_full(self.engine)
            await self._look()
            if full and not is_full(self.engine):
                self._changed()

    def _miss(self, error: EndpointError) -> None:
        """Note a failed probe. One alone may be a busy machine's: the next one goes out at once, and decides."""
        if error.kind is FaultKind.STARTING:
            self._set(self._breaker.starting(error.reason, time.monotonic()))
        elif self._missed or self._breaker.state is State.OPEN:
            self._set(self._breaker.unreached(error.reason, time.monotonic()))
        self._missed = self._breaker.state is not State.OPEN

    @property
    def peer(self) -> PeerFacts | None:
        """What another fleet says; None of an engine. Thread-safe."""
        return self._link.peer

    async def _look(self) -> None:
        """Ask the engine for its facts; one that has none is asked again later. The last ones hold until it answers."""
        if self._mute_until > time.monotonic():
            return
        for path, read in ((METRICS, read_metrics), (SLOTS, read_slots)):
            with contextlib.suppress(EndpointError):
                found = read(await self._link.probe(path, self._timeout, base=self._link.root))
                if found is not None:
                    self.engine = found
                    return
        self.engine = None
        self._mute_until = time.monotonic() + ASK_AGAIN

    async def _extensions(self, probed: bytes) -> Collection[str]:
        """What the server announces, perhaps in the answer to a probe; nothing if it does not say."""
        about = self._protocol.ABOUT
        with contextlib.suppress(EndpointError):
            answer = (
                probed if probed and about == self._protocol.HEALTH else await self._link.probe(about, self._timeout)
            )
            return self._protocol.extensions(answer)
        return ()

    def _set(self, breaker: Breaker) -> None:
        before, self._breaker = self._breaker, breaker
        if breaker.state is before.state:
            return
        if breaker.state is State.OPEN:
            logger.warning("endpoint out of service", extra={"reason": breaker.reason})
        elif before.state is State.OPEN:
            logger.info("endpoint in service", extra={"state": str(breaker.state)})
        self._changed()


METRICS, SLOTS = "/metrics", "/slots"
"""Paths at an engine's root: metrics in Prometheus's text format, and llama.cpp's list of slots."""

FULL_CACHE = 0.97
"""Share of its cache from which on an engine gets no further request: it would evict others."""

_MOST_REQUESTS = 1e6  # requests; more is not believed
_Figure = Literal["running", "waiting", "cache"]

_FIGURES: Mapping[str, _Figure] = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "cache",
    "vllm:gpu_cache_usage_perc": "cache",
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "waiting",
    "sglang:token_usage": "cache",
    "llamacpp:requests_processing": "running",
    "llamacpp:requests_deferred": "waiting",
    "llamacpp:kv_cache_usage_ratio": "cache",
    "tgi_batch_current_size": "running",
    "tgi_queue_size": "waiting",
    "nv_inference_pending_request_count": "waiting",
}


class _Slot(msgspec.Struct, frozen=True):
    is_processing: bool


_slots = msgspec.json.Decoder(Annotated[list[_Slot], msgspec.Meta(max_length=10_000)]).decode


def read_metrics(body: bytes) -> EngineLoad | None:
    """What the metrics of a known engine report, over all of its models; None of any other."""
    wanted = [line for line in body.decode(errors="replace").splitlines() if _name(line) in _FIGURES]
    found: dict[_Figure, list[float]] = {}
    try:
        for family in text_string_to_metric_families("\n".join(wanted) + "\n"):
            for sample in family.samples:
                found.setdefault(_FIGURES[sample.name], []).append(_bounded(sample.value))
    except (ValueError, KeyError, IndexError):  # the parser's errors for text of another format
        return None
    if not found:
        return None
    return EngineLoad(
        running=round(min(sum(found.get("running", ())), _MOST_REQUESTS)),
        waiting=round(min(sum(found.get("waiting", ())), _MOST_REQUESTS)),
        cache=min(max(found.get("cache", ()), default=0.0), 1.0),
    )


def read_slots(body: bytes) -> EngineLoad | None:
    """What llama.cpp's list of slots reports; None of anything else."""
    try:
        return EngineLoad(running=sum(slot.is_processing for slot in _slots(body)))
    except UNREADABLE:
        return None


def is_full(engine: EngineLoad | None) -> bool:
    """Whether a further request would wait in the engine, where it cannot be moved."""
    return engine is not None and (engine.waiting > 0 or engine.cache >= FULL_CACHE)


def _name(line: str) -> str:
    return line.partition("{")[0].partition(" ")[0]


def _bounded(value: float) -> float:
    return min(max(value, 0.0), _MOST_REQUESTS) if math.isfinite(value) else 0.0


class Target:
    """One address of an endpoint. For its event loop; each request uses it as a context manager."""

    def __init__(self, link: EndpointLink, health: EndpointHealth) -> None:
        self.link, self.health = link, health
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self) -> None:
        """Begin to send probes."""
        await self.link.open()
        self._probing = asyncio.create_task(self.health.run())

    async def probe(self) -> None:
        """Send one probe before the target is opened."""
        await self.link.open()
        try:
            await self.health.probe()
        finally:
            await self.link.close()

    async def open_probed(self) -> None:
        """Open, and return after the first probe; if the wait for it is cancelled, the target is closed again."""
        await self.open()
        try:
            await self.health.probed.wait()
        except asyncio.CancelledError:
            await self.leave()
            raise

    async def leave(self) -> None:
        """Send no more probes, and close the connections once no request runs."""
        self._probing.cancel()
        try:
            await self._idle.wait()
        finally:
            await asyncio.gather(self._probing, return_exceptions=True)
            await self.link.close()

    def __enter__(self) -> Target:
        self._running += 1
        self._idle.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._running -= 1
        if not self._running:
            self._idle.set()


class Places:
    """The `target` of new requests, and those that are left. For one event loop, except for `follow`.

    Args:
        wake: called when the endpoint may get more or less than before.
        resized: called with a description that is followed from now on.

    Raises:
        EndpointConfigError: the endpoint's certificates cannot be read.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        protocol: EndpointProtocol,
        key: str,
        variants: EndpointVariants,
        *,
        stall: float,
        origin: Origin,
        wake: Callable[[], None],
        resized: Callable[[Endpoint], None],
    ) -> None:
        self.endpoint = endpoint
        self._protocol, self._key = protocol, key
        self._variants = variants
        self._stall, self._origin = stall, origin
        self._wake = wake
        self._resized = resized
        self.target = self._target_of(endpoint, variants.device)
        self.gone = ""  # why the endpoint cannot be found
        self._changes: deque[Endpoint] = deque(maxlen=1)
        self._move: asyncio.Task[None] | None = None
        self._left: set[asyncio.Task[None]] = set()

    def follow(self, endpoint: Endpoint) -> None:
        """Go by another description. Thread-safe."""
        self._changes.append(endpoint)
        self._wake()

    def turn(self) -> None:
        """Begin to go where the last description says."""
        if self._changes and (self._move is None or self._move.done()):
            self._move = asyncio.create_task(self._change(self._changes.popleft()))

    @property
    def moves(self) -> list[asyncio.Task[None]]:
        """What still goes on."""
        return [*self._left] if self._move is None else [self._move, *self._left]

    async def _change(self, endpoint: Endpoint) -> None:
        """Go by another description of the endpoint. Where it is elsewhere now, requests go there after a probe."""
        self.gone = ""
        here, target = self._variants.device, self.target
        try:
            device = replace(
                endpoint_device(endpoint, here.label, urlsplit(here.address).port or 0), prices=here.prices
            )
            if connection(endpoint, device.address) != connection(self.endpoint, here.address):
                target = self._target_of(endpoint, device)
        except DeviceMissingError as error:
            self.gone = f"{error} in queues.yaml now"
            return
        except EndpointConfigError as error:
            logger.error("endpoint is used as it was", extra={"reason": str(error)})
            return
        if target is not self.target:
            await target.open_probed()
            self._leave_behind(self.target)
        self.endpoint, self.target = endpoint, target
        self._variants.change(endpoint, device)
        self._variants.announce(target.health)
        self._resized(endpoint)
        target.health.resize(endpoint.slots)

    def _leave_behind(self, target: Target) -> None:
        """Leave a target that gets no more requests, once those that run there have ended."""
        leaving = asyncio.create_task(target.leave())
        self._left.add(leaving)
        leaving.add_done_callback(self._left.discard)

    def _target_of(self, endpoint: Endpoint, device: Device) -> Target:
        link = open_link(endpoint, device.address, self._key, self._stall, self._origin)
        health = EndpointHealth(link, self._protocol, endpoint, self._wake, self._announced)
        return Target(link, health)

    def _announced(self, health: EndpointHealth) -> None:
        if health is self.target.health:
            self._variants.announce(health)
