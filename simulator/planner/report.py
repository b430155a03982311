"""A plan as a report: what to buy, what it attains, and what other loads require."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from simulator.fleet import SERVICES
from simulator.planner.plan import Answer, Plan, Sensitivity
from simulator.reports.fleet_plan import plan_tables
from simulator.reports.report import percent


def tables(answer: Answer) -> list[Table | Text]:
    """The mix, its attainment, how it was found, the fleet's plan on it, and the other loads, in this order."""
    plan = answer.plan
    followed = answer.fleet_plan
    planned: list[Table | Text] = (
        [] if followed is None else [part for shown in plan_tables(followed) for part in (shown, Text())]
    )
    return [
        _mix(plan),
        Text(),
        _attained(answer.slo, plan),
        Text(_found(plan), style="dim"),
        Text(),
        *planned,
        _loads(answer.loads),
    ]


def _mix(plan: Plan) -> Table:
    shown = _table("class", "instance", right=("instances", "devices", "$ an hour", "busy"))
    for row in plan.mix:
        kind = f"{row.instance} (spot)" if row.spot else row.instance
        cells = [str(row.instances), str(row.devices), f"{row.usd_per_hour:.2f}", percent(row.utilisation)]
        shown.add_row(*map(Text, [row.hardware_class, kind, *cells]))
    instances, devices = sum(row.instances for row in plan.mix), sum(row.devices for row in plan.mix)
    shown.add_row("in all", "", str(instances), str(devices), f"{plan.usd_per_hour:.2f}", "", style="bold")
    return shown


def _attained(slo: Mapping[str, float], plan: Plan) -> Table:
    shown = _table("service", right=("asked", "attained", "headroom"))
    headroom = plan.rounds[-1].headroom
    for name in SERVICES:
        shown.add_row(name, percent(slo.get(name)), percent(plan.attainment[name]), f"×{headroom[name]:.2f}")
    return shown


def _found(plan: Plan) -> str:
    tried = ", ".join(f"${one.usd_per_hour:.2f}" for one in plan.rounds)
    since = f"{plan.replays - len(plan.rounds)} cheaper ones since, which saved ${plan.saved:.2f}"
    return f"{plan.requests:,} requests; mixes replayed: {tried} an hour; {since}"


def _loads(loads: Sequence[Sensitivity]) -> Table:
    shown = _table("load", right=("$ an hour", *SERVICES))
    shown.add_column("mix", overflow="fold")
    for row in loads:
        if row.mix is None or row.attainment is None:
            cells, mix = ["–"] * (1 + len(SERVICES)), row.infeasible or ""
        else:
            cells = [f"{row.usd_per_hour:.2f}", *(percent(row.attainment[name]) for name in SERVICES)]
            mix = ", ".join(f"{number} × {name}" for name, number in row.mix.items())
        shown.add_row(f"×{row.load:g}", *map(Text, [*cells, mix]))
    return shown


def _table(*left: str, right: Sequence[str]) -> Table:
    shown = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in left:
        shown.add_column(name, no_wrap=True)
    for name in right:
        shown.add_column(name, justify="right", no_wrap=True)
    return shown
