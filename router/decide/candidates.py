"""A model's candidates under one fleet snapshot, as columns: built once per snapshot, read for every request."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from msgspec.structs import replace

from router.decide.classify import LEAVING, Candidate, Constraints, Refusal, classify, leaving, with_place
from router.decide.plan import Guide, guide_of, preferred_class
from router.decide.scaling import coming
from router.decide.snapshot import FleetSnapshot
from tasks.heartbeat import ANY, Allowed, DeviceFacts, dollars_per_hour, variant_key
from tasks.models.model import Model, Profile, generates
from tasks.models.profiles import KnownProfile, ProfileBook
from tasks.queues.hours import opens_in
from tasks.topology import HardwareClass, Topology
from taxiway.contract.keys import LEVELS, flow

RESIDENCE = 60.0
"""Approximate seconds that a loaded variant stays resident; its load cost is shared by the jobs that arrive meanwhile.
"""

SHARED_ROWS = 16
"""Rows that share the price of a generating model's steps, whatever batch it has now.

At the price of the present batch, work would stay on a class that already runs one, however expensive it is. Source:
three simulated fleets of five models, 900 s each: live attainment +1.1 to +3.2 points, cost -11 to +1 %."""

LATE_SHARE = 0.05
"""Share of jobs that may take longer than "at most": 1 less the quantile of the residuals that workers learn."""

UNLEARNED = 3.0
"""The residual of a variant that has not run on the class's devices, if all that ran there strayed by less.

Source: `lab.drills.estimates newcomer`, at a load of 10 to 15 on two cores. By the profiles' residuals 1 of 8
bounds held, with 2 all but the first one or two of each fleet, with 3 all of 16."""

Column = np.ndarray
"""float64 of shape (candidates,)."""


@dataclass(frozen=True, slots=True, eq=False)
class CandidateTable:
    """Every candidate's figures that do not depend on the request, and why the other pairs are refused."""

    model: Model
    classes: tuple[str, ...]
    """Names of the hardware classes, which `queue` indexes."""
    candidates: tuple[Candidate, ...]
    refusals: tuple[Refusal, ...]
    warnings: tuple[str | None, ...]
    """Why a candidate's profile is weak; None if it is not."""
    # Columns: an entry for each candidate. Times in seconds
    queue: np.ndarray
    """The index of its class in `classes`."""
    servers: Column
    """Devices of the class that can run it, at least 1."""
    coming: Column
    """Further devices that the class is scaled to have for its work."""
    start: Column
    """Seconds until one that starts now serves."""
    live: np.ndarray
    """Whether it has devices, or its class can start some."""
    reserved: np.ndarray
    """Whether its class is reserved for another service."""
    warm: Column
    """Share of the devices that hold the variant."""
    base: Column
    """The mean profile of those devices: `base`, `step`, `slope` and `floor` as in `tasks.models.profiles`."""
    step: Column
    slope: Column
    floor: Column
    prompt: np.ndarray | None
    """What a prompt's token adds to `step` and `slope`, of shape (2, candidates); None if nothing."""
    load: Column
    """Expected time until the variant is loaded."""
    loading: Column
    """The part of `load` that is not the start of a device."""
    beyond: Column
    """What a job waits for it beyond `load`, where more than a few jobs meet a cold device."""
    concurrent: Column
    """Device seconds of work that runs beside a new job: a full batch if rows join between steps, else 0."""
    billed: Column | None
    """Rows that share a generated row's price; None if batches run as a whole and share their price."""
    blocked: np.ndarray
    """Until the first device finishes a long batch of less urgent work, of shape (LEVELS, candidates)."""
    blocking: np.ndarray
    """What the most urgent work may wait beyond it for another model's batch, of the same shape."""
    residual: np.ndarray
    """What a finish time is multiplied by to get what it takes at most, of the same shape."""
    limit: Column
    """The most rows in a batch; of another fleet those that run there beside each other (`beside_each_other`)."""
    max_run: Column
    """The most seconds of a batch of several rows; unbounded if rows join and leave between steps."""
    horizon: Column
    """The work that may wait on the class before jobs are held."""
    # Prices in US dollars
    dollars: Column
    """A device second, on average of the devices."""
    dearer: Column
    """A second of the dearest device, as a multiple of `dollars`."""
    shadow: Column
    """The shadow price of a device second."""
    spot_loss: Column
    """Reclaims of spot capacity per second."""
    link_delay: Column
    """Seconds of a transfer to the class that do not depend on its size."""
    link_seconds: Column
    """Seconds per byte of a transfer."""
    egress: Column
    """Dollars per byte of a transfer."""
    metered: np.ndarray | None
    """What each row, token of input and token of output costs besides, of shape (3, candidates); None if nothing."""
    offered: np.ndarray | None
    """Which prices are those of other fleets' offers; None if none is."""
    allowed: np.ndarray | None
    """Requests and tokens a second that rate limits allow, and those left now, of shape (2, 2, candidates)."""
    # The traffic and the plan
    rates: np.ndarray
    """Rows per second at each device of the class: now, and with all of the model's, of shape (2, candidates)."""
    sharers: float
    """Rows that arrive while a loaded variant stays resident."""
    stale: bool
    """Whether the snapshot could not be read in time."""
    guide: Guide | None = None
    """What the plan says about these requests."""
    unplanned: str = ""
    """Why there is no `guide`; empty if there is no plan at all."""


def build_table(
    model: Model,
    constraints: Constraints,
    topology: Topology,
    fleet: FleetSnapshot,
    book: ProfileBook,
    place: tuple[str, str] | None = None,
) -> CandidateTable:
    """The candidate table of `model` for requests under these constraints.

    A `place` is the class and variant of jobs that wait: it is a candidate also while no device can run them there.
    With a stale fleet, only the classes that had devices in the last snapshot count as live; all classes if there was
    none.
    """
    known = FleetSnapshot(stale=True) if fleet.stale else fleet
    classes = tuple(sorted(topology.hardware))
    able = leaving(*classify(model, constraints, topology, known), known)
    candidates, refusals = with_place(place, *able, model, topology)
    starting = {} if fleet.stale else starting_in(topology, fleet)
    seen = [_Seen.of(candidate, model, book, constraints.service, starting=starting) for candidate in candidates]
    flows = {name: known.rates.get(flow(name, model.id), 0.0) for name in classes}
    servers = np.array([len(c.devices) or 1 for c in candidates], dtype=np.float64)
    total = sum(flows.values())
    columns = {name: np.array([s.columns[name] for s in seen], dtype=np.float64) for name in _COLUMNS}
    prompt = np.array([s.prompt for s in seen], dtype=np.float64).reshape(-1, 2).T
    guide, unplanned = _guide(model, constraints, known, candidates)
    return CandidateTable(
        model=model,
        classes=classes,
        candidates=tuple(candidates),
        refusals=tuple(refusals),
        warnings=tuple(s.warning for s in seen),
        queue=np.array([classes.index(c.hardware_class) for c in candidates], dtype=np.intp),
        servers=servers,
        coming=np.array([float(coming(c.hardware_class, topology, known)) for c in candidates]),
        live=_live(candidates, fleet, topology, starting),
        reserved=np.array([c.hardware.reserve_for not in (None, constraints.service) for c in candidates], dtype=bool),
        billed=billed(columns["limit"]) if generates(model) else None,
        max_run=np.array([math.inf if generates(model) else c.hardware.runs_at_most for c in candidates], dtype=float),
        shadow=np.array([known.shadow.get(c.hardware_class, 0.0) for c in candidates], dtype=np.float64),
        residual=np.array([s.residual for s in seen], dtype=np.float64).reshape(-1, LEVELS).T,
        prompt=prompt if prompt.any() else None,
        metered=_metered(candidates, model, constraints.service),
        offered=_offered(candidates),
        allowed=_allowed(candidates),
        rates=np.array([_rates(c, flows[c.hardware_class], total) for c in candidates]).reshape(-1, 2).T / servers,
        sharers=total * RESIDENCE,
        stale=fleet.stale,
        guide=guide,
        unplanned=unplanned,
        **columns,
        **_class_columns(candidates),
        **_blocking_columns(candidates, model.id),
    )


def starting_in(topology: Topology, fleet: FleetSnapshot) -> Mapping[str, float]:
    """Seconds until a device serves, of each class whose devices are started on demand or at the hour it opens.

    Another fleet that cannot be reached may be back as soon.
    """
    found = {name: topology.hardware[name].scaling.start for name in fleet.startable if name in topology.hardware}
    for name, hardware in topology.hardware.items():
        start = hardware.scaling.start
        if hardware.is_peer:
            found[name] = start
        if left := opens_in(hardware.available, fleet.now - start):  # it opens, or has opened so lately
            found[name] = left
    return found


def _live(
    candidates: Sequence[Candidate], fleet: FleetSnapshot, topology: Topology, starting: Collection[str]
) -> np.ndarray:
    """The table's `live`: which candidates have devices, or get some.

    Another fleet that cannot be reached takes only what nothing else can: it waits there.
    """
    last_seen = {device.hardware_class for device in fleet.devices} or set(topology.hardware)
    coming = last_seen if fleet.stale else starting
    live = [bool(c.devices) or (c.hardware_class in coming and c.absent != LEAVING) for c in candidates]
    here = [one and (bool(c.devices) or not c.hardware.is_peer) for one, c in zip(live, candidates, strict=True)]
    return np.array(here if any(here) else live, dtype=bool)


_ANY_NUMBER = 1e9  # rows a second: what comes finds as many beside it as may be there


def _rates(candidate: Candidate, here: float, total: float) -> tuple[float, float]:
    """The table's `rates` of a candidate, at all devices. Another fleet forms its batches itself."""
    return (_ANY_NUMBER, _ANY_NUMBER) if candidate.hardware.is_peer else (here, total)


def billed(limit: Column) -> Column:
    """The rows that share the price of a generated row on candidates that run at most `limit` rows together."""
    rows: Column = np.minimum(limit, SHARED_ROWS)
    return rows


def _metered(candidates: Sequence[Candidate], model: Model, service: str) -> np.ndarray | None:
    """The table's `metered`: by the class's tariff, or by what other fleets offer, the dearest of its devices."""
    tariffs = [_tariff(candidate, variant_key(model.id, candidate.variant_name), service) for candidate in candidates]
    return np.array(tariffs, dtype=np.float64).T if any(map(any, tariffs)) else None


def _tariff(candidate: Candidate, key: str, service: str) -> tuple[float, float, float]:
    """US dollars for each row, token of input and token of output."""
    offers = [offer for device in candidate.devices if (offer := device.offer(key, service)) is not None]
    tariff = candidate.hardware.price.tariff
    if offers:
        return max((offer.usd, offer.usd_read, offer.usd_written) for offer in offers)
    return (0.0, 0.0, 0.0) if tariff is None else (tariff.request, tariff.input, tariff.output)


def _offered(candidates: Sequence[Candidate]) -> np.ndarray | None:
    """The table's `offered`."""
    which = [candidate.hardware.is_peer for candidate in candidates]
    return np.array(which) if any(which) else None


def _allowed(candidates: Sequence[Candidate]) -> np.ndarray | None:
    """The table's `allowed`: sums over the devices of each candidate, if all of them are limited."""
    known = [[d.endpoint.allowed if d.endpoint else None for d in candidate.devices] for candidate in candidates]
    if not any(limit for limits in known for limit in limits):
        return None
    unlimited = [[math.inf, 0.0], [math.inf, 0.0]]
    figures = [_allowed_by(limits) if limits and all(limits) else unlimited for limits in known]
    return np.array(figures, dtype=np.float64).transpose(1, 2, 0)


def _allowed_by(limits: Sequence[Allowed | None]) -> list[list[float]]:
    """A second and left, of requests and of tokens."""
    known = [limit for limit in limits if limit is not None]
    requests = [(math.inf if one.requests is None else one.requests, one.requests_left) for one in known]
    tokens = [(math.inf if one.tokens is None else one.tokens, one.tokens_left) for one in known]
    return [[math.fsum(part) for part in zip(*pairs, strict=True)] for pairs in (requests, tokens)]


def _guide(
    model: Model, constraints: Constraints, fleet: FleetSnapshot, candidates: Sequence[Candidate]
) -> tuple[Guide | None, str]:
    """The table's `guide` and `unplanned`."""
    plan = fleet.plan
    if plan is None:
        return None, fleet.unplanned
    cell = plan.cell(model.id, constraints.service, constraints.locality)
    if cell is None:
        return None, f"plan {plan.number} does not cover these requests"
    moving_to = cell.classes[:1] if cell.handover is not None else ()
    now_in = preferred_class(cell, {name: len(fleet.of_class(name)) for name in moving_to}, fleet.now)
    if now_in is None:
        return None, f"plan {plan.number} starts {cell.classes[0]} for these requests"
    serve = {candidate.hardware_class for candidate in candidates if candidate.devices}
    guide = guide_of(plan, cell, [candidate.hardware_class for candidate in candidates], serve, now_in)
    return guide, f"plan {plan.number} prefers {now_in}, where these requests may not run" if guide is None else ""


def _price_columns(candidates: Sequence[Candidate]) -> dict[str, Column]:
    prices = [dollars_per_hour(c.devices, c.hardware_class, c.hardware) for c in candidates]
    means = [math.fsum(each) / len(each) for each in prices]
    dearer = [each[-1] / mean if mean else 1.0 for each, mean in zip(prices, means, strict=True)]
    return {"dollars": np.array(means, dtype=np.float64) / 3600, "dearer": np.array(dearer, dtype=np.float64)}


def _class_columns(candidates: Sequence[Candidate]) -> dict[str, Column]:
    def column(figure: Callable[[HardwareClass], float]) -> Column:
        return np.array([figure(c.hardware) for c in candidates], dtype=np.float64)

    return {
        **_price_columns(candidates),
        "horizon": column(lambda h: h.horizon),
        "start": column(lambda h: h.scaling.start),
        "spot_loss": column(lambda h: h.reclaims_per_hour / 3600),
        "link_delay": column(lambda h: h.link.delay),
        "link_seconds": np.array([1 / _bytes_per_second(c) for c in candidates], dtype=np.float64),
        "egress": column(lambda h: h.link.egress_usd_per_gib / 2**30),
    }


UNMEASURED = 1e9
"""Bytes a second of a link of which nothing is known."""


def _bytes_per_second(candidate: Candidate) -> float:
    """What the link to the candidate's class carries: as stated, else as measured of the slowest line to a fleet."""
    peers = [device.peer for device in candidate.devices if device.peer is not None]
    measured = [peer.bytes_per_second for peer in peers if peer.bytes_per_second > 0]
    return candidate.hardware.link.bytes_per_second or min(measured, default=UNMEASURED)


_COLUMNS = ("limit", "warm", "base", "step", "slope", "floor", "load", "loading", "beyond", "concurrent")


@dataclass(frozen=True, slots=True)
class _Seen:
    """The figures of `CandidateTable` for one candidate, by its devices."""

    columns: dict[str, float]
    prompt: tuple[float, float]
    residual: tuple[float, ...]
    warning: str | None

    @classmethod
    def of(
        cls, candidate: Candidate, model: Model, book: ProfileBook, service: str, *, starting: Mapping[str, float]
    ) -> _Seen:
        """The means over the candidate's devices, each at its pace; without any, by the start of one."""
        coming = not candidate.devices and candidate.hardware_class in starting
        start = starting[candidate.hardware_class] if coming else 0.0
        key = variant_key(model.id, candidate.variant_name)
        known = _known(candidate, model, book)
        profiles = [_profile(device, k, key, service) for device, k in known]
        paces = expected([device.pace for device, _ in known], key)
        loads = expected([device.loading for device, _ in known], key)
        rates = [offer.rate for device, _ in known if (offer := device.offer(key, service)) is not None]

        def mean(figure: Callable[[Profile], float], paces: Sequence[float] = paces) -> float:
            figures = [pace * figure(one) for pace, one in zip(paces, profiles, strict=True)]
            return float(np.mean(np.sort(figures)))  # sorted: the result does not depend on the order of devices

        limit = _limit(candidate, rates, mean(lambda one: one.latency(1, model.expected_size)))
        beside = mean(lambda one: one.latency(limit, model.expected_size))
        warm, load = sum(key in device.warm for device, _ in known) / len(known), mean(lambda one: one.load, loads)
        step, slope = mean(lambda one: one.step), mean(lambda one: one.slope)
        columns = {
            "limit": limit,
            "warm": warm,
            "base": mean(lambda one: one.base),
            "step": step,
            "slope": slope,
            "floor": mean(lambda one: one.floor),
            "load": (1.0 - warm) * (start + load),
            "loading": (1.0 - warm) * load,
            "beyond": warm * (start + load) if warm < 1.0 - LATE_SHARE else 0.0,
            "concurrent": beside if candidate.hardware.is_peer or generates(model) else 0.0,
        }
        return cls(
            columns,
            (mean(lambda one: one.of_prompt[0]) - step, mean(lambda one: one.of_prompt[1]) - slope),
            tuple(_residual(known, key, level, service) for level in range(LEVELS)),
            _absent(candidate, start) if coming else _warning(known, key, service),
        )


def beside_each_other(rate: float, seconds: float, slots: float) -> float:
    """Rows that run beside each other at another fleet, which serves `rate` a second and answers in so many seconds.

    Of a burst, each further row then waits for `1 / rate` more than the one before it, or for one of the `slots`. So
    equal fleets share a burst, and unequal ones take of it by what they serve.
    """
    return min(max(rate * seconds, 1.0), slots)


def expected(learned: Sequence[Mapping[str, float]], key: str) -> list[float]:
    """A variant's expected seconds on each device, as a multiple of its profile: as learned there, or as is likely.

    Where it has not run, it is as slow as the device is with all that ran there (`ANY`), times how much slower than
    they are the variant is with all that runs on the class's other devices.

    `learned` is what each device learned, by variant and for `ANY`.
    """
    if all(key in each for each in learned):
        return [each[key] for each in learned]
    usual = _mean([each[ANY] for each in learned if ANY in each])
    odd = _mean([each[key] / each.get(ANY, usual) for each in learned if key in each])
    return [each.get(key, odd * each.get(ANY, usual)) for each in learned]


def _mean(ratios: Sequence[float]) -> float:
    """Their geometric mean; 1 without any."""
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0


def _known(candidate: Candidate, model: Model, book: ProfileBook) -> list[tuple[DeviceFacts, KnownProfile]]:
    """Each live device with the variant's profile on it; the class's device kind if none is live."""
    live = [(d, book.lookup(model, candidate.variant_name, d.kind, d.name)) for d in candidate.devices]
    if live:
        return live
    kind = candidate.hardware.device
    absent = DeviceFacts(
        worker="",
        hardware_class=candidate.hardware_class,
        device="",
        kind=kind,
        emulated=False,
        name="",
        memory_total=0,
        memory_free=0,
    )
    return [(absent, book.lookup(model, candidate.variant_name, kind, ""))]


def _profile(device: DeviceFacts, known: KnownProfile, key: str, service: str) -> Profile:
    """What the device learned of the variant with this key, or another fleet offers; else its profile."""
    offer = device.offer(key, service)
    if offer is not None:
        assert device.peer is not None
        base = offer.base + device.peer.round_trip
        return Profile(base=base, step=offer.each_written, load=0.0, prompt_step=offer.each_read)
    curve = device.endpoint.curves.get(key) if device.endpoint is not None else None
    return known.profile if curve is None else replace(curve, load=known.profile.load)


def _absent(candidate: Candidate, start: float) -> str:
    """What is to be said of a candidate without devices that will have some."""
    if candidate.hardware.is_peer:
        return "no line to the site: what only it can do waits for it"
    return f"no device is live: one starts in {start:g} s"


def _warning(known: Sequence[tuple[DeviceFacts, KnownProfile]], key: str, service: str) -> str | None:
    for device, _ in known:
        offer = device.offer(key, service)
        if offer is not None and (peer := device.peer) is not None:
            signed = f"signed at {datetime.fromtimestamp(peer.signed_at, UTC):%FT%TZ}, " if peer.signed_at else ""
            more = f"{peer.age:.1f} s old, {signed}{1000 * peer.round_trip:.0f} ms away"
            return f"offer of site {peer.site}, {more}: it takes {offer.rate:.3g} rows/s"
    return next((k.warning for _, k in known if k.warning), None)


def _residual(known: Sequence[tuple[DeviceFacts, KnownProfile]], key: str, level: int, service: str) -> float:
    """The largest residual that a device learned for the level, or another fleet offers.

    If there is none, the largest in the profiles, or of all variants that the devices ran, at least `UNLEARNED`.
    """
    learned = [r for device, _ in known if (r := device.residual_of(key, level)) is not None]
    learned += [offer.bound for device, _ in known if (offer := device.offer(key, service)) is not None]
    usual = [r for device, _ in known if (r := device.residual_of(ANY, level)) is not None]
    return max(learned) if learned else max(UNLEARNED, *usual, *(k.residual for _, k in known))


def _blocking_columns(candidates: Sequence[Candidate], model: str) -> dict[str, Column]:
    """The table's `blocked`, and `blocking`: what other models' batches add to it for the most urgent work.

    Other work has time for them. More urgent batches, and those of a level itself, are counted in the work ahead.
    """
    blocked = np.array([_blocked(c.devices) for c in candidates], dtype=np.float64).reshape(-1, LEVELS).T
    blocking = np.zeros_like(blocked)
    blocking[0] = np.maximum([_blocking(c.devices, model) for c in candidates] - blocked[0], 0.0)
    return {"blocked": blocked, "blocking": blocking}


def _blocked(devices: Sequence[DeviceFacts]) -> list[float]:
    """For each level, the seconds until the first device finishes a less urgent batch."""
    return [min((d.blocked if d.blocked_by > level else 0.0 for d in devices), default=0.0) for level in range(LEVELS)]


def _blocking(devices: Sequence[DeviceFacts], model: str) -> float:
    """Seconds that a job of the model may wait for a batch of another, on average over the devices."""
    return math.fsum(device.blocking_of(model) for device in devices) / max(len(devices), 1)


def _limit(candidate: Candidate, rates: Sequence[float], seconds: float) -> float:
    """The table's `limit`; `rates` are those that other fleets offer, where a row takes so many seconds."""
    most = float(min(candidate.hardware.max_batch, candidate.variant.max_batch or candidate.hardware.max_batch))
    return beside_each_other(min(rates) / len(candidate.devices), seconds, most) if rates else most
