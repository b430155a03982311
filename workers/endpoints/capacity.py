"""How much work an endpoint gets at once, and where: its slots and how they are used, its rate limits, its edits."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from tasks.heartbeat import Allowed
from tasks.queues.endpoints import Endpoint, Rate
from taxiway.contract.keys import LEVELS
from workers.decide.endpoints import Bucket, EndpointRates, learned, rates_of
from workers.device import Device, DeviceMissingError, endpoint_device
from workers.endpoints.health import EndpointHealth
from workers.endpoints.http import EndpointConfigError
from workers.endpoints.protocol import EndpointError, Exchange, FaultKind
from workers.endpoints.variants import EndpointVariants
from workers.stages.queues import DeviceUse

logger = logging.getLogger(__name__)

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
        rates, now = self._rates, time.monotonic()
        if rates == EndpointRates():
            return None
        (requests, left), (tokens, tokens_left) = _left_of(rates.requests, now), _left_of(rates.tokens, now)
        return Allowed(requests=requests, requests_left=left, tokens=tokens, tokens_left=tokens_left)

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


def _left_of(bucket: Bucket | None, now: float) -> tuple[float | None, float]:
    return (None, 0.0) if bucket is None else (round(bucket.rate, 6), round(bucket.left(now), 3))


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
