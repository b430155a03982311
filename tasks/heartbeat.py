"""One device's facts, published with each heartbeat, and the classes that it may serve by them.

They are all that routers know of workers. Routers decide by `unfit_for` which other classes a device may serve, and
workers enforce it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Literal

import msgspec

from tasks.models.discovered import Announced
from tasks.models.model import Profile
from tasks.topology import DeviceKind, HardwareClass, Topology
from taxiway.contract.peers import SiteOffer

HEARTBEAT = 1.0
"""Seconds between two heartbeats of a device."""

GONE_AFTER = 5 * HEARTBEAT
"""Seconds of silence after which a device counts as gone: five missed heartbeats."""

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
"""Upper bounds of the buckets, in seconds: from an echo's batch to a bulk job's hour."""

ANY = ""
"""In `DeviceFacts.blocking`, any model that a device has not run lately; in what it learned, all variants together."""

Stage = Literal["queue", "run", "total", "bound", "first", "token"]
"""What a latency is of: from acceptance to the start, the batches it ran in, from acceptance to the result.

`bound` is no latency but the share of a placement's "at most" that the job took: up to 1 it held (`held_of`).
On endpoints, also from sending a row to the first part of its answer, and for each further token.
"""

STAGES: tuple[Stage, ...] = ("queue", "run", "total")
"""Stages that each job goes through."""


class Use(msgspec.Struct, frozen=True):
    """Rows that one model ran on endpoints, those `aborted`, and tokens of input, of that cached, and of output.

    `excess` is what endpoints counted beyond what the rows may have had, which is in no other figure. A model in a
    worker's process has output alone.
    """

    rows: int = 0
    aborted: int = 0
    input: int = 0
    cached: int = 0
    output: int = 0
    excess: int = 0

    def plus(self, more: Use, less: Use | None = None) -> Use:
        """This and what `more` has beyond `less`."""
        before = less or Use()
        names = self.__struct_fields__
        return Use(*(getattr(self, name) + getattr(more, name) - getattr(before, name) for name in names))


class Done(msgspec.Struct, frozen=True):
    """What was done for one hardware class.

    `outcomes` counts jobs by their final state; `latency` maps each stage to jobs by bucket, with one more for those
    beyond all bounds, and then their seconds in all. `rejected` counts messages that no router had ordered. `used`
    has each model's part of endpoints, by its id, and `dollars` what it cost by tenant, in US dollars: tenants that
    queues.yaml does not name are one, without a name.
    """

    outcomes: dict[str, int] = {}
    latency: dict[Stage, tuple[float, ...]] = {}
    rejected: int = 0
    used: dict[str, Use] = {}
    dollars: dict[str, dict[str, float]] = {}


def empty() -> list[float]:
    """The figures of a stage that no job went through."""
    return [0.0] * (len(BOUNDS) + 2)


def count(figures: list[float], seconds: float) -> None:
    """Count one job in a stage's figures."""
    figures[bisect_left(BOUNDS, seconds)] += 1
    figures[-1] += seconds


def held_of(figures: Sequence[float]) -> tuple[int, int]:
    """Of the figures of `bound`: how many jobs kept within "at most", of how many."""
    *counts, _ = figures
    return int(sum(counts[: BOUNDS.index(1.0) + 1])), int(sum(counts))


def median_of(figures: Sequence[float]) -> float:
    """The median of a stage's figures, as if those of a bucket were spread evenly over it."""
    *counts, _ = figures
    left = sum(counts) / 2
    for below, upper, jobs in zip((0.0, *BOUNDS), BOUNDS, counts, strict=False):
        if jobs and left <= jobs:
            return below + (upper - below) * left / jobs
        left -= jobs
    return BOUNDS[-1]


class Allowed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An endpoint's rate limits: `requests` and `tokens` per second, None if unlimited, and what is left of them."""

    requests: float | None = None
    requests_left: float = 0.0
    tokens: float | None = None
    tokens_left: float = 0.0


class Yieldable(msgspec.Struct, frozen=True, array_like=True):
    """A running job that gives up its place when it is asked to."""

    job: str
    token: str
    """Of its claim."""
    tag: str
    """Of its message; empty if Celery holds that."""
    level: int
    due: float
    """Seconds by the store's clock; 0 without a deadline."""
    run: float
    """Seconds since it began; of a callable, those of all its runs that led to where it is."""
    left: float
    """Seconds until its answer, at most."""
    redo: float
    """Seconds of its next run that would repeat what was done."""
    cuts: int
    """How often it was cut before."""
    kind: str = ""
    """That of the device that its checkpoint needs; empty for any."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine reports: all clients' requests that run and wait there, and the used share of its cache."""

    running: int = 0
    waiting: int = 0
    cache: float = 0.0


class PeerFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker knows of the fleet that it hands work to: the `site`, and its `offers` by variant and service."""

    site: str
    round_trip: float = 0.0
    """Seconds of the line, there and back."""
    bytes_per_second: float = 0.0
    """What the line carried of large requests lately; 0 before the first."""
    age: float = 0.0
    """Seconds since the offers came."""
    signed_at: float = 0.0
    """Unix time that they have by the site's clock; 0 if they are not signed with its `public_key`."""
    offers: dict[str, dict[str, SiteOffer]] = {}
    keys: tuple[str, ...] = ()
    """Names of the keys that are both here and of sealed labels there."""
    dropped: int = 0
    """Answers that cannot be opened, or came for an attempt which had been given up here, or was never sent."""

    def offer(self, variant: str, service: str) -> SiteOffer | None:
        """What it offers for a variant and service, else for its own default service; None if nothing."""
        made = self.offers.get(variant, {})
        return made.get(service, made.get(""))


class EndpointFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker knows of its endpoint: the `state` of its circuit breaker, what rate limits allow, and `curves`.

    The curve of a variant is learned from answers, and used in place of its profile, but for its `load`. `engine` is
    None where the endpoint tells nothing.
    """

    state: Literal["closed", "open", "half-open"]
    allowed: Allowed | None = None
    curves: dict[str, Profile] = {}
    engine: EngineLoad | None = None
    pause: float = 0.0
    """Seconds for which it asked to be sent nothing."""
    peer: PeerFacts | None = None
    """Of another fleet alone."""


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device at one instant. Sizes are bytes.

    Of a variant, predicted is what the profile says that `tasks.models.profiles` has for this `kind` and `name`.
    `pace`, `residual` and `loading` have, under `ANY`, what the device's variants have in common: what to expect of one
    that has not run there.
    """

    worker: str
    hardware_class: str
    device: str
    kind: DeviceKind
    """What it really is."""
    emulated: bool
    """Its class asks for another kind."""
    name: str
    memory_total: int
    memory_free: int
    memory_used: int = 0
    utilisation: float = 0.0
    """0 to 1."""
    instruction_sets: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    # Variants as `model:version/variant`
    warm: tuple[str, ...] = ()
    unavailable: dict[str, str] = {}
    """Why a variant cannot be loaded."""
    held: int = 0
    """Jobs that were fetched and have not ended."""
    running: int = 0
    """Rows on the device now."""
    batch_age: float = 0.0
    """Seconds for which their batch has run."""
    occupied: float = 0.0
    """Device seconds that it will still spend on rows of ended jobs."""
    blocked: float = 0.0
    """Seconds until a batch ends that is longer than its class's `max_run` and cannot be interrupted."""
    blocked_by: int = 0
    """The level of its most urgent job: more urgent work waits for it, too."""
    blocking: dict[str, float] = {}
    """Seconds that a job of a model may wait for a batch of another (`blocking_of`)."""
    pace: dict[str, float] = {}
    """Observed over predicted run time, by warm variant."""
    residual: dict[str, tuple[float, ...]] = {}
    """What 95 % of batches and jobs keep within, over what was expected, by variant and level (`residual_of`)."""
    loading: dict[str, float] = {}
    """Observed over predicted load time, by variant."""
    drifted: tuple[str, ...] = ()
    """Variants whose profile no longer fits."""
    serves: tuple[str, ...] | None = None
    """Classes whose queues it takes from, its own first; None: its own alone."""
    fault: str = ""
    """Why it takes no work, such as an endpoint without an answer; it serves no class then."""
    endpoint: EndpointFacts | None = None
    """Of endpoints alone."""
    announced: dict[str, Announced] = {}
    """Models of an endpoint that have no model.yaml, by name."""
    draining: bool = False
    """It accepts no more jobs."""
    joined: bool = False
    """It may serve its own class alone."""
    opens: tuple[str, ...] = ()
    """Names of the keys whose sealed inputs it opens; at another fleet, those that some label there has, too."""
    yieldable: tuple[Yieldable, ...] = ()
    """The running jobs that can yield."""
    done: dict[str, Done] = {}
    """The worker's counters by class, since its start."""
    usd_per_hour: float | None = None
    """Price of its node; None where the worker has none (`dollars_per_hour`)."""

    def offer(self, variant: str, service: str) -> SiteOffer | None:
        """What the fleet behind it offers for a variant and service; None of any other device."""
        return None if self.peer is None else self.peer.offer(variant, service)

    @property
    def peer(self) -> PeerFacts | None:
        """The fleet behind it; None of any other device."""
        return None if self.endpoint is None else self.endpoint.peer

    @property
    def host(self) -> str:
        """The machine that its worker runs on, by name."""
        return self.worker.partition("@")[2]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that it serves now, its own first; none while it drains."""
        if self.draining:
            return ()
        return (self.hardware_class,) if self.serves is None else self.serves

    @property
    def busy_for(self) -> str:
        """The class that its time counts for: the one that it is lent to, else its own."""
        return self.classes[-1] if self.classes else self.hardware_class

    def blocking_of(self, model: str) -> float:
        """Seconds that a job of a model may wait for a batch of another."""
        return self.blocking.get(model, self.blocking.get(ANY, 0.0))

    def residual_of(self, variant: str, level: int) -> float | None:
        """What was learned of a variant's batches with jobs of one level; None where nothing was."""
        learned = self.residual.get(variant)
        return learned[min(level, len(learned) - 1)] if learned else None


def dollars_per_hour(devices: Sequence[DeviceFacts], name: str, hardware: HardwareClass) -> list[float]:
    """The price of each of the devices that serve a class, in ascending order; the class's own price without any.

    A device that is lent to the class is on anyway, and costs there what the class says.
    """
    prices = [device.usd_per_hour if device.hardware_class == name else None for device in devices]
    return sorted(hardware.dollars_per_hour if price is None else price for price in prices) or [
        hardware.dollars_per_hour
    ]


def three_digits(figure: float) -> float:
    """A learned figure as a heartbeat reports it; three digits are more than its accuracy."""
    return float(f"{figure:.3g}")


def variant_key(model: str, variant: str) -> str:
    """`model:version/variant`, the name of a variant across the fleet."""
    return f"{model}/{variant}"


NOMINAL = 0.9
"""Share of a class's memory that a device must have: a card sold with 24 GiB tells its driver of 22.5 (NVIDIA L4)."""


def unfit_for(name: str, device: DeviceFacts, topology: Topology) -> str | None:
    """Why the device may not serve the class `name`; None where it may, as it may its own."""
    if name == device.hardware_class:
        return None
    if name not in topology.hardware:
        return f"expected one of {', '.join(sorted(topology.hardware))}, got {name!r}"
    own, other = topology.hardware[device.hardware_class], topology.hardware[name]
    if own.endpoint is not None:
        return "an endpoint serves its own class only"
    if device.joined:
        return "a machine that joined serves its own class only"
    return _other_device(device, own, other) or _other_place(own, other)


def is_emulated(kind: DeviceKind, hardware: HardwareClass) -> bool:
    """Whether a device that really is of `kind` stands in for another where it serves the class."""
    return kind != hardware.device


def _other_device(device: DeviceFacts, own: HardwareClass, other: HardwareClass) -> str | None:
    """A device emulates only if it was started so, and only the kind of its own class."""
    if other.device != device.kind and not (device.emulated and other.device == own.device):
        return f"the class is for {other.device}, {device.device} is {device.kind}"
    memory = min(own.memory or device.memory_total, device.memory_total)
    if other.memory is not None and memory < NOMINAL * other.memory:
        return f"the class has {other.memory} bytes of memory, {device.device} may use {memory}"
    if not set(other.runtimes) & set(device.runtimes):
        return f"the class runs {', '.join(other.runtimes)}, of which {device.worker} has none"
    return None


def _other_place(own: HardwareClass, other: HardwareClass) -> str | None:
    """A retargeted device must not run work bound to a location it lacks, or work that may not run on spot capacity."""
    elsewhere = sorted(set(other.labels) - set(own.labels))
    if elsewhere:
        return f"the class is labelled {', '.join(elsewhere)}, which the device's own is not"
    if own.capacity == "spot" and other.capacity != "spot":
        return "the device is spot capacity, and the class is not"
    return None


def lacking(wanted: Collection[str], have: Collection[str]) -> list[str]:
    """The instruction sets in `wanted` that a device with `have` lacks.

    A CUDA device runs what was built for any lower compute capability: `sm_89` meets `sm_80`. Suffixes are exact: only
    `sm_90a` meets `sm_90a` (CUDA C++ Programming Guide, "Compute Capabilities").
    """
    missing = set(wanted).difference(have) if wanted else None
    if not missing:  # the usual case, and routers ask for each variant and device
        return []
    highest = max((_capability(one) for one in have), default=0)
    return sorted(one for one in missing if not 0 < _capability(one) <= highest)


def _capability(instruction_set: str) -> int:
    """The number in `sm_89`; 0 for anything else."""
    number = instruction_set.removeprefix("sm_")
    return int(number) if number != instruction_set and number.isdecimal() else 0
