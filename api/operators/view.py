"""The fleet as shown to operators and callers.

One value, `FleetView`, is behind `GET /v2/fleet`, `taxiway top` and the metrics. Its `problems` are what needs an
operator's attention, from the view alone: `taxiway status`, `top`, `doctor` and the page at `/` all show this list.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from broker.port import Moved, QueueHead
from router.decide.plan import SCARCE, STALE, Cell, Followed, LatestTuning, preferred_class
from router.decide.scaling import ScalingTarget
from router.decide.snapshot import FleetSnapshot
from router.upkeep.timeline import FleetSample, utilisation_of
from tasks.heartbeat import HEARTBEAT, DeviceFacts, dollars_per_hour, held_of, is_emulated, median_of
from tasks.models.folder import ProcessReport
from tasks.topology import HardwareClass, Price
from taxiway.contract.keys import LEVELS


class Calibration(msgspec.Struct, frozen=True):
    """How far what placements state as "at most" can be trusted, by the `jobs` that its devices ended.

    `held` is the share of them that kept within it, and `taken` the share of it that the median job took.
    """

    jobs: int
    held: float
    taken: float


class ClassView(msgspec.Struct, frozen=True, kw_only=True):
    """One hardware class. Times in seconds, money in US dollars."""

    device: str
    devices: int
    emulated: int
    usd_per_hour: float
    """What a device costs now, on average."""
    price: Price
    """All that queues.yaml says."""
    spending: float
    """Per hour, of all devices."""
    utilisation: float
    """0 to 1."""
    depth: tuple[int, ...]
    """Waiting messages by level if the broker reports it, else one total."""
    oldest: float
    """Age of the oldest waiting job since acceptance."""
    # Device seconds by level
    work: tuple[float, ...]
    """Queued and running."""
    held: tuple[float, ...]
    """In holding for the class."""
    rows_per_second: float
    running: int
    warm: tuple[str, ...]
    replicas: int | None
    """Devices there should be; `why` is the reason."""
    lacks: int
    """Devices that have been missing for longer than one takes to start."""
    why: str
    starts: bool = False
    """Whether an autoscaler starts its devices."""
    bounds: Calibration | None = None
    """None before any job has ended."""


class FleetProblem(msgspec.Struct, frozen=True):
    """Something that needs an operator's attention: what it is about, what is wrong, and what to do."""

    subject: str
    text: str
    remedy: str


class PlannedCell(msgspec.Struct, frozen=True, kw_only=True):
    """Requests in the plan: the class that they prefer, and the one that they go to until devices of it serve.

    `until_then` is empty if they are placed one by one until then, and None if they do not move. The plan expects the
    share `in_time` of them in time.
    """

    model: str
    service: str
    locality: str | None
    prefers: str
    until_then: str | None = None
    in_time: float = 1.0


class PlanView(msgspec.Struct, frozen=True, kw_only=True):
    """The stored plan and the tuner."""

    number: int | None
    """None without a plan that can be read."""
    age: float | None
    """Seconds."""
    not_followed: str
    """Why this router does not follow it; empty if it does."""
    followers: int
    """Of the `routers`."""
    routers: int
    score: float | None
    """US dollars an hour that the tuner expects, penalties included."""
    cells: tuple[PlannedCell, ...]
    tuner: str
    """The one at work; empty if there is none."""
    tuned: float | None = None
    """Seconds since the last tuning; `found` is what it found."""
    adopted: bool = False
    found: str = ""
    period: float = 0.0
    """Seconds between two tunings."""


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole fleet."""

    stale: bool
    """Its state could not be read recently."""
    now: float
    """Seconds by the store's clock."""
    held: int
    """Held jobs."""
    dead: int
    """Dead letters."""
    classes: dict[str, ClassView]
    devices: tuple[DeviceFacts, ...]
    moves: tuple[Moved, ...]
    """Latest first."""
    refuses: bool = False
    """The state store cannot write to its disk, and refuses requests and heartbeats."""
    memory: float = 0.0
    """The share of its memory limit that the state store uses if requests are refused for it, else 0."""
    draining: bool = False
    """The site hands its work to other fleets."""
    silent: dict[str, float] = {}
    """Seconds since the last heartbeat of workers that are not in `devices`: they died, or lost the state store."""
    # Models by name
    disabled: Mapping[str, str] = {}
    """Why they are not served."""
    outdated: Mapping[str, str] = {}
    """Those served as they were before their file became invalid, and why."""
    # Processes
    restart: tuple[str, ...] = ()
    """Those whose queues.yaml has changed since they started."""
    queues_wrong: Mapping[str, str] = {}
    """Those whose queues.yaml has become invalid, and why."""
    clocks: Mapping[str, int] = {}
    """Seconds that their host's clock is ahead of the store's, where that is `APART` or more."""
    plan: PlanView | None = None
    """None if there is neither a plan nor a tuner."""
    # Events for webhook endpoints: to be sent, and given up
    webhooks_waiting: int = 0
    webhooks_dead: int = 0
    tokens: int = 0
    """Read and generated since this router started, as far as engines count what they read."""
    ended: int = 0
    """Jobs that ended in the last `LATELY` seconds, as this router saw them."""
    missed: int = 0
    """Those of `ended` that missed their deadline."""
    refused: int = 0
    """Requests that this router refused in that time for lack of hardware."""
    deviceless: int = 0
    """Those of `refused` that no live device could run."""
    failing: Mapping[str, str] = {}
    """Processes of `taxiway up` that failed within a minute of health, and how."""
    problems: tuple[FleetProblem, ...] = ()
    """What of all this needs attention."""


class FleetTimeline(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet's samples of the last 15 minutes, oldest first; `now` is the state store's time."""

    now: float
    samples: tuple[FleetSample, ...]


SILENT = 2.5 * HEARTBEAT
"""Seconds without a heartbeat after which a device is not shown; decisions still use it until `GONE_AFTER`."""


def view_plan(
    followed: Followed,
    fleet: FleetSnapshot,
    now: float,
    reports: Iterable[ProcessReport],
    tuner: str,
    latest: LatestTuning | None,
    period: float,
) -> PlanView | None:
    """The plan and the tuner at `now`; None if there is neither.

    `reports` are what processes report of themselves, `latest` is the last tuning, and `tuner` the token of the tuner
    that holds the lease. A tuner that tuned lately counts without it: on a busy machine a search may outlast the lease.
    """
    if not followed.raw and not tuner and latest is None:
        return None
    plan = followed.stored
    routers = [report.plan for report in reports if report.kind == "router"]
    serving = {name: len(fleet.of_class(name)) for name in {cell.classes[0] for cell in plan.cells}} if plan else {}
    return PlanView(
        number=plan.number if plan is not None else None,
        age=max(now - plan.made, 0.0) if plan is not None else None,
        not_followed=followed.why,
        followers=routers.count(plan.number) if plan is not None else 0,
        routers=len(routers),
        score=plan.score if plan is not None else None,
        cells=tuple(_planned_cell(cell, serving, now) for cell in plan.cells) if plan is not None else (),
        tuner=tuner.rpartition("#")[0] or (latest.tuner if latest is not None and now - latest.at < STALE else ""),
        tuned=max(now - latest.at, 0.0) if latest is not None else None,
        adopted=latest is not None and latest.adopted,
        found=latest.why if latest is not None else "",
        period=period,
    )


def _planned_cell(cell: Cell, serving: Mapping[str, int], now: float) -> PlannedCell:
    at_present = preferred_class(cell, serving, now)
    return PlannedCell(
        model=cell.model,
        service=cell.service,
        locality=cell.locality,
        prefers=cell.classes[0],
        until_then=None if at_present == cell.classes[0] else at_present or "",
        in_time=round(cell.in_time, 4),
    )


def shown(device: DeviceFacts) -> DeviceFacts:
    """The device without the tokens under which its running jobs are claimed."""
    yieldable = tuple(msgspec.structs.replace(one, token="", tag="") for one in device.yieldable)
    return msgspec.structs.replace(device, yieldable=yieldable) if yieldable else device


def silent_for(devices: Sequence[DeviceFacts], heartbeats: Mapping[str, float], now: float) -> dict[str, float]:
    """Seconds since the last heartbeat of each worker that has been silent for longer than `SILENT`."""
    ages = {device.worker: now - heartbeats.get(device.worker, now) for device in devices}
    return {worker: round(age, 3) for worker, age in ages.items() if age > SILENT}


def view_class(
    name: str,
    hardware: HardwareClass,
    fleet: FleetSnapshot,
    head: QueueHead,
    target: ScalingTarget | None,
    oldest: float,
) -> ClassView:
    """One class of the fleet; `oldest` is the age of its oldest waiting job, in seconds."""
    devices = fleet.of_class(name)
    none = (0.0,) * LEVELS
    prices = dollars_per_hour(fleet.own(name), name, hardware)
    return ClassView(
        device=hardware.device,
        devices=len(devices),
        emulated=sum(is_emulated(device.kind, hardware) for device in devices),
        usd_per_hour=sum(prices) / len(prices),
        price=hardware.price,
        spending=fleet.spending(name, hardware),
        utilisation=utilisation_of(devices),
        depth=head.depths,
        oldest=oldest,
        work=tuple(fleet.work.get(name, none)),
        held=tuple(fleet.held.get(name, none)),
        rows_per_second=sum(rate for traffic, rate in fleet.rates.items() if traffic.partition("|")[0] == name),
        running=sum(device.running for device in devices),
        warm=tuple(sorted({key.partition("/")[0] for device in devices for key in device.warm})),
        replicas=None if target is None else target.replicas,
        lacks=0 if target is None else target.lacks,
        why="no fleet snapshot yet" if target is None else target.reason,
        starts=name in fleet.startable,
        bounds=calibration(name, fleet.devices),
    )


def calibration(hardware_class: str, devices: Iterable[DeviceFacts]) -> Calibration | None:
    """How the placements on a class held, by what live workers have counted since they started."""
    counted = [done.latency.get("bound", ()) for device in devices if (done := device.done.get(hardware_class))]
    figures = [sum(column) for column in zip(*filter(None, counted), strict=True)]
    held, jobs = held_of(figures) if figures else (0, 0)
    return Calibration(jobs, round(held / jobs, 4), round(median_of(figures), 4)) if jobs else None


MISSED = 0.01
"""Share of the jobs that ended lately from which missed deadlines are a problem."""

PAUSE = 5.0
"""Seconds for which an endpoint asked to be sent nothing from which that is a problem."""


def problems(view: FleetView) -> tuple[FleetProblem, ...]:
    """The fleet's problems: first what stops it, then what serves too little, then what waits for somebody's look."""
    found = (_store, _processes, _capacity, _scarcity, _draining, _queues, _models, _other)
    return tuple(problem for problems_of in found for problem in problems_of(view))


def _store(view: FleetView) -> Iterator[FleetProblem]:
    if view.stale:
        text = "does not answer the router: these figures are stale"
        yield FleetProblem("state store", text, "start it, or repair the network; `taxiway doctor` has details")
    if view.refuses:
        text = "cannot write to its disk, and refuses requests and heartbeats"
        yield FleetProblem("state store", text, "free space there")
    if view.memory:
        text = f"uses {view.memory:.0%} of its memory limit, and requests are refused"
        yield FleetProblem("state store", text, "raise its maxmemory, or lower keep_result and keep_record")


def _processes(view: FleetView) -> Iterator[FleetProblem]:
    for process, why in view.failing.items():
        yield FleetProblem(f"process {process}", why, "read its log, in the folder `logs` of the data directory")
    for worker, seconds in view.silent.items():
        text = f"no heartbeat for {seconds:.0f} s"
        yield FleetProblem(f"worker {worker}", text, "see whether it runs and reaches the state store")
    for process, ahead in view.clocks.items():
        text = f"{abs(ahead)} s {'ahead of' if ahead > 0 else 'behind'} the state store's, which deadlines follow"
        yield FleetProblem(f"clock of {process}", text, "synchronise both machines (NTP)")


def _capacity(view: FleetView) -> Iterator[FleetProblem]:
    for device in view.devices:
        if device.fault:
            yield FleetProblem(device.worker, f"out of service: {device.fault}", "`taxiway doctor` asks each endpoint")
        elif device.endpoint is not None and device.endpoint.pause >= PAUSE:
            text = f"its endpoint asked to be sent nothing for {device.endpoint.pause:.0f} s"
            yield FleetProblem(
                device.worker, text, "it is overloaded, or its quota is used up: raise it, or set `rate`"
            )
    for name, one in view.classes.items():
        if one.lacks:
            text = f"{one.devices} of {one.replicas} devices: {one.why}"
            yield FleetProblem(f"class {name}", text, "start workers of the class")


def _scarcity(view: FleetView) -> Iterator[FleetProblem]:
    for cell in view.plan.cells if view.plan is not None and not view.plan.not_followed else ():
        if cell.in_time < SCARCE:
            text = f"{cell.in_time:.0%} in time by the plan, on {cell.prefers}: more work than hardware, and other work"
            text = f"{text} costs more when it is late; requests that would be late are refused"
            yield FleetProblem(f"{cell.service} {cell.model}", text, "raise `scaling.maximum`, or add hardware")
    asked, late = view.ended + view.refused, view.refused - view.deviceless
    if view.deviceless and view.deviceless >= MISSED * asked:
        text = f"{view.deviceless} of the last {asked} were refused at once: no live device can run them"
        yield FleetProblem("requests", text, "start workers; `taxiway explain --what-if MODEL` names the classes")
    if late and late >= MISSED * asked:
        text = f"{late} of the last {asked} were refused at once: no device would have answered them in time"
        yield FleetProblem("requests", text, "raise `scaling.maximum`, or add hardware; the page at / has each service")
    if view.missed and view.missed >= MISSED * view.ended:
        text = f"{view.missed} of the last {view.ended} jobs missed theirs"
        yield FleetProblem(
            "deadlines", text, "`taxiway jobs --state expired` lists them, `taxiway explain ID` says why"
        )


def _draining(view: FleetView) -> Iterator[FleetProblem]:
    if view.draining:
        text = "drains: it hands to other fleets what these offer to run, and runs the rest"
        yield FleetProblem("site", text, "`taxiway drain` lists what stays, `taxiway drain --end` serves again")


def _queues(view: FleetView) -> Iterator[FleetProblem]:
    readers: defaultdict[str, list[str]] = defaultdict(list)
    for process, why in view.queues_wrong.items():
        readers[why].append(process)
    for why, names in readers.items():
        text = f"invalid, and used in its last valid version until a restart by {', '.join(names)}: {why}"
        yield FleetProblem("queues.yaml", text, "correct it before a restart; `taxiway check` shows all errors")
    if view.restart:
        text = f"changed: restart needed of {', '.join(view.restart)}"
        yield FleetProblem("queues.yaml", text, "end them one after the other, so that they start again")


def _models(view: FleetView) -> Iterator[FleetProblem]:
    for name, why in view.disabled.items():
        yield FleetProblem(f"model {name}", f"is disabled: {why}", "`taxiway check`")
    for name, why in view.outdated.items():
        yield FleetProblem(f"model {name}", f"is served in its last valid version: {why}", "`taxiway check`")
    lacking: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for device in view.devices:
        for variant in device.unavailable.items():
            lacking[variant].append(device.worker)
    for (key, why), workers in lacking.items():
        yield FleetProblem(key, f"unavailable on {', '.join(workers)}: {why}", "`taxiway doctor`")


def _other(view: FleetView) -> Iterator[FleetProblem]:
    plan = view.plan
    if plan is not None and plan.not_followed:
        yield FleetProblem("plan", plan.not_followed, "start a tuner: python -m simulator tune; or delete taxiway:plan")
    elif plan is not None and not plan.tuner:
        text = "no tuner at work, so the plan will not follow the load"
        yield FleetProblem("tuner", text, "start one: python -m simulator tune")
    if view.dead:
        text = f"jobs or messages that were given up: {view.dead}"
        yield FleetProblem("dead letters", text, "`taxiway dead list`, then replay or drop them")
    if view.webhooks_dead:
        text = f"events that were given up: {view.webhooks_dead}"
        yield FleetProblem("webhooks", text, "GET /v1/webhook_endpoints says whose; then replay them: docs/webhooks.md")
