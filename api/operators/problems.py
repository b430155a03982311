"""What needs an operator's attention, from the fleet's view alone: `FleetView.problems`. Pure.

`taxiway status`, `top` and `doctor` and the page at `/` all show this list.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from api.operators.view import FleetProblem, FleetView
from router.decide.plan import SCARCE

MISSED = 0.01
"""Share of the jobs that ended lately from which missed deadlines are a problem."""


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
    asked = view.ended + view.refused
    if view.refused and view.refused >= MISSED * asked:
        text = f"{view.refused} of the last {asked} were refused at once: no device would have answered them in time"
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
