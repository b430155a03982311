"""The plan that routers follow, from what a tuning decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from router.decide.plan import Cell, ClassPlan, Handover, Plan
from simulator.fleet import SERVICES, Fleet
from simulator.policies.policy import Cell as Place
from simulator.policies.policy import able_classes
from simulator.tuning.search import Costs
from simulator.tuning.tuner import Decision
from simulator.tuning.twin import Window

Name = tuple[str, str | None]
"""A model's id and the locality of its requests."""


def plan_of(
    decision: Decision,
    fleet: Fleet,
    window: Window,
    *,
    number: int,
    made: float,
    name_of: Callable[[str], Name] = lambda model: (model, None),
) -> Plan:
    """The decision as a plan.

    Args:
        decision: what a tuning of `window` on `fleet` decided; `made` and its handovers are on the same clock.
        fleet: the classes, by whose place the decision names them.
        window: the arrivals that were played.
        number: the plan's number.
        made: when it was decided.
        name_of: what a model of the fleet file stands for in the real fleet.
    """
    names, models = list(fleet.classes), window.workload.trace.models
    costs, due = Costs.of(window, fleet, (1.0,) * len(names)), _tightest(window)
    able = able_classes(fleet, models)
    cells = []
    for cell, place in decision.assignment.classes.items():
        model, locality = name_of(models[cell[0]])
        dollars = costs.dollars.get(cell, range(len(names)))
        others = sorted((other for other in able[cell] if other != place), key=lambda other: dollars[other])
        move = decision.moves.get(cell)
        former = names[move.former] if move is not None and move.former is not None else None
        cells.append(
            Cell(
                model=model,
                service=SERVICES[cell[1]],
                locality=locality,
                classes=(names[place], *(names[other] for other in others)),
                deadline=due.get(cell),
                handover=Handover(former=former, devices=move.devices, latest=move.latest)
                if move is not None
                else None,
            )
        )
    used = sorted(decision.assignment.used())
    classes = {
        names[place]: ClassPlan(rule=decision.assignment.rules[place], devices=decision.devices[place])
        for place in used
    }
    return Plan(number=number, made=made, cells=tuple(cells), classes=classes, score=decision.predicted)


def _tightest(window: Window) -> Mapping[Place, float]:
    """The shortest deadline of each cell's requests."""
    due: dict[Place, float] = {}
    for job in window.jobs:
        cell = (job.model, job.service)
        due[cell] = min(due.get(cell, job.deadline), job.deadline)
    return due
