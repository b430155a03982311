"""Where an endpoint's requests go, whether it gets work now, and how much at once.

Whether: by probes, its engine's report and pauses it asks for. How much: by its slots and how they are used, and by its
rate limits. An edit of queues.yaml makes another place of it.

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
from dataclasses import dataclass, replace
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tasks.heartbeat import Allowed, EngineLoad
from tasks.models.discovered import Announced
from tasks.queues.endpoints import Endpoint, Rate
from taxiway.contract.keys import LEVELS
from taxiway.errors import UNREADABLE
from workers.decide.endpoints import learned, rates_of
from workers.decide.faults import Breaker, State
from workers.device import Device, DeviceMissingError, endpoint_device
from workers.endpoints.http import EndpointConfigError, EndpointLink
from workers.endpoints.protocol import EndpointError, EndpointProtocol, Exchange, FaultKind
from workers.endpoints.variants import EndpointVariants
from workers.stages.queues import DeviceUse

logger = logging.getLogger(__name__)

DISCOVER_EVERY = 10.0
"""Seconds between two looks for models of an endpoint whose probe lists none."""

ASK_AGAIN = 60.0
"""Seconds until an endpoint without figures of its engine is asked again."""

SHORTEST_PAUSE = 0.1
"""Seconds for which no request is sent, at least, after one for which the endpoint had no capacity."""


class EndpointHealth:
    """One endpoint's, at the other end of `link`. For its event loop; any thread may read `fault`, `pause` and `slots`.

    `listed` are the models that the last probe announced, None if it listed none, and `models` those that are served
    without a model.yaml, by what the server calls them. `extensions` are those that the server announces.

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
        self.link, self._protocol, self._announced = link, protocol, announced
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
        if error.kind is FaultKind.REFUSED:
            self.answered()
            return
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

    async def open(self) -> None:
        """Connect, and begin to send probes."""
        await self.link.open()
        self._probing = asyncio.create_task(self.run())

    async def close(self) -> None:
        """Send no more probes, and disconnect."""
        self._probing.cancel()
        await asyncio.gather(self._probing, return_exceptions=True)
        await self.link.close()

    async def probe_alone(self) -> None:
        """Send one probe before `open`."""
        await self.link.open()
        try:
            await self.probe()
        finally:
            await self.link.close()

    async def run(self) -> None:
        """Send probes until cancelled."""
        while True:
            await self.probe()
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
            body = await self.link.probe("", self._timeout, base=self._asked)
            listed = self._protocol.announced(body) if self._lists else None
            if listed != self.listed or began >= self._discover_at:
                self.extensions = await self._extensions(body if self._lists else b"")
                if self._discovers:
                    self.models = await self.link.converse(self._protocol.discover(), self._timeout)
                self._discover_at = time.monotonic() + DISCOVER_EVERY
            self.listed = listed
            self._announced(self)
        except EndpointError as error:
            if self.link.received <= began:  # else it answers others, and is only slow to answer this
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

    async def _look(self) -> None:
        """Ask the engine for its facts; one that has none is asked again later. The last ones hold until it answers."""
        if self._mute_until > time.monotonic():
            return
        for path, read in ((METRICS, read_metrics), (SLOTS, read_slots)):
            with contextlib.suppress(EndpointError):
                found = read(await self.link.probe(path, self._timeout, base=self.link.root))
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
                probed if probed and about == self._protocol.HEALTH else await self.link.probe(about, self._timeout)
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
                value = min(max(sample.value, 0.0), _MOST_REQUESTS) if math.isfinite(sample.value) else 0.0
                found.setdefault(_FIGURES[sample.name], []).append(value)
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


_SMOOTHING = 0.1  # weight of the newest row in what is usual


@dataclass(frozen=True, slots=True)
class Seat:
    """A row's slot since a time: with how much of the endpoint each running row had until then."""

    since: float
    shares: float


def pieces_of(exchange: Exchange, now: float) -> tuple[float | None, float | None]:
    """Seconds until the first part of an answer came, and for each token after it until `now`; None where unknown."""
    if not exchange.first:
        return None, None
    first = exchange.first - exchange.sent
    more = exchange.tokens.output - 1
    return first, (now - exchange.first) / more if more > 0 else None


class EndpointUse(DeviceUse):
    """Rows on an endpoint with slots. Times are seconds on one clock. Any thread may read it.

    n rows that run together have a n-th of the endpoint each, so that the shares of all rows add up to its busy time.
    """

    def __init__(self, slots: int, health: EndpointHealth) -> None:
        self._health = health
        self._usual_share = 0.0
        self.running = 0
        self._slots = slots
        self._at = 0.0
        self._shares = 0.0
        self._used = 0.0

    def enter(self, now: float) -> Seat:
        """A row begins."""
        self._advance(now)
        self.running += 1
        return Seat(now, self._shares)

    def share(self, seat: Seat, now: float) -> float:
        """The share of the endpoint's time that a running row has had so far, in seconds."""
        self._advance(now)
        return self._shares - seat.shares

    def leave(self, seat: Seat, now: float) -> tuple[float, float]:
        """A row ends: the seconds that it ran, and its share of the endpoint's time in seconds."""
        self._advance(now)
        self.running -= 1
        return now - seat.since, self._shares - seat.shares

    def move(self, place: EndpointPlace, now: float) -> None:
        """Rows go to another place from now on."""
        self._advance(now)
        self._slots, self._health = place.endpoint.slots, place.health

    def learn(self, share: float) -> None:
        """A row that was answered had this share of the endpoint's time."""
        self._usual_share += _SMOOTHING * (share - self._usual_share)

    def occupied(self, now: float) -> float:
        """Seconds of the endpoint for what waits in the engine: it is not ours, or we would know."""
        engine = self._health.engine
        return 0.0 if engine is None else engine.waiting * self._usual_share

    def blocked(self, now: float) -> tuple[float, int]:
        """The seconds of the pause that the endpoint asked for, for jobs of every level."""
        left = self._health.pause
        return (left, LEVELS) if left else (0.0, 0)

    def computed(self, now: float) -> float:
        """Seconds for which slots were used, a slot counting by its part of all."""
        return self._used + self.running / self._slots * max(now - self._at, 0.0)

    def _advance(self, now: float) -> None:
        self._used = self.computed(now)
        if self.running:
            self._shares += (now - self._at) / self.running
        self._at = now


LONGEST_TURN = 0.5
"""Seconds that a row waits in its slot for its turn; for longer its job returns to the queue, where it may be moved."""


class RateGate:
    """What may be sent. For one event loop; any thread may read `free`, `wait` and `allowed`."""

    def __init__(self, rate: Rate) -> None:
        self._size = 1.0
        self._rates = rates_of(rate.requests_per_minute, rate.tokens_per_minute, time.monotonic())

    @property
    def free(self) -> float:
        """How many rows of the usual size may be sent now; infinite without limits."""
        return math.floor(free) if math.isfinite(free := self._rates.free(self._size, time.monotonic())) else free

    @property
    def wait(self) -> float:
        """Seconds until a row of the usual size may be sent."""
        return self._rates.wait(self._size, time.monotonic())

    @property
    def allowed(self) -> Allowed | None:
        """What heartbeats report of it; None without limits."""
        return self._rates.allowed(time.monotonic())

    async def enter(self, size: int) -> None:
        """Wait until a row of at most `size` tokens may be sent, and count it.

        Raises:
            EndpointError: that takes too long; it says how long.
        """
        while (wait := self._rates.wait(size, time.monotonic())) > 0:
            if wait > LONGEST_TURN:
                raise EndpointError(FaultKind.BUSY, f"rate limit of the endpoint: next request in {wait:.3g} s", wait)
            await asyncio.sleep(wait)
        self._rates = self._rates.taken(size, time.monotonic())

    def leave(self, exchange: Exchange, size: int) -> None:
        """Count what a row that was let in with `size` really took, and learn what its answer stated."""
        used, now = exchange.tokens, time.monotonic()
        took = used.input + used.output
        self._size += _SMOOTHING * (max(took, 1) - self._size) if exchange.ran else 0.0
        unsent = 0.0 if exchange.sent else -1.0
        self._rates = learned(self._rates.taken(took - size, now, requests=unsent), exchange.headers, now)


class EndpointPlace:
    """An endpoint as one description of it says: its health, its slots and its rate limits. For one event loop."""

    def __init__(self, endpoint: Endpoint, health: EndpointHealth) -> None:
        self.endpoint, self.health = endpoint, health
        self.slots = asyncio.Semaphore(endpoint.slots)
        self.gate = RateGate(endpoint.rate)

    async def leave(self) -> None:
        """Disconnect once what runs here, or waits for a slot, has ended."""
        try:
            for _ in range(self.endpoint.slots):
                await self.slots.acquire()
        finally:
            await self.health.close()


MakePlace = Callable[[Endpoint, Device, Callable[[EndpointHealth], None]], EndpointPlace]
"""Makes the place of a description and a device; its health calls the last argument after each probe that succeeded."""


class EndpointPlaces:
    """Where rows go `now`, and what is left behind. For one event loop, except for `follow`.

    `gone` is why queues.yaml has the endpoint no more; empty if it has.
    """

    def __init__(
        self, endpoint: Endpoint, variants: EndpointVariants, make: MakePlace, wake: Callable[[], None]
    ) -> None:
        self._variants, self._make, self._wake = variants, make, wake
        self.now = make(endpoint, variants.device, self._announced)
        self.use = EndpointUse(endpoint.slots, self.now.health)
        self.gone = ""
        self._edits: deque[Endpoint] = deque(maxlen=1)
        self._move: asyncio.Task[None] | None = None
        self._left: set[asyncio.Task[None]] = set()

    def follow(self, edit: Endpoint) -> None:
        """Go by what queues.yaml says now: elsewhere after a probe; what runs ends where it began. Thread-safe."""
        self._edits.append(edit)
        self._wake()

    def turn(self) -> None:
        """Begin to go by the last edit, once the one before is done with."""
        if self._edits and (self._move is None or self._move.done()):
            self._move = asyncio.create_task(self._go(self._edits.popleft()))

    async def close(self) -> None:
        """Disconnect."""
        tasks = [*self._left] if self._move is None else [self._move, *self._left]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.now.health.close()

    async def _go(self, endpoint: Endpoint) -> None:
        here, self.gone = self._variants.device, ""
        try:
            there = endpoint_device(endpoint, here.label, urlsplit(here.address).port or 0)
            device = replace(there, prices=here.prices)
            place = self._make(endpoint, device, self._announced)
        except DeviceMissingError as error:
            self.gone = f"{error} in queues.yaml now"
            return
        except EndpointConfigError as error:
            logger.error("endpoint is used as it was", extra={"reason": str(error)})
            return
        if endpoint.rate == self.now.endpoint.rate:
            place.gate = self.now.gate  # what was sent counts there, too
        await place.health.probe_alone()
        await place.health.open()
        leaving = asyncio.create_task(self.now.leave())
        self._left.add(leaving)
        leaving.add_done_callback(self._left.discard)
        self.now = place
        self._variants.change(endpoint, device)
        self._announced(place.health)
        self.use.move(place, time.monotonic())
        self._wake()

    def _announced(self, health: EndpointHealth) -> None:
        if health is self.now.health:
            self._variants.announce(health)
