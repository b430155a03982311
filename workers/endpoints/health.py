"""Whether an endpoint gets work now: by probes, its engine's report and pauses it asks for.

Sources: vLLM, docs/usage/metrics.md; SGLang, references/production_metrics; llama.cpp, tools/server/README.md; TGI,
reference/metrics; Triton, user_guide/metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tasks.heartbeat import EngineLoad, PeerFacts
from tasks.models.discovered import Announced
from tasks.queues.endpoints import Endpoint
from taxiway.errors import UNREADABLE
from workers.decide.faults import Breaker, State
from workers.endpoints.http import EndpointLink
from workers.endpoints.protocol import EndpointError, EndpointProtocol, FaultKind

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

    @property
    def peer(self) -> PeerFacts | None:
        """What another fleet says; None of an engine. Thread-safe."""
        return self.link.peer

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
