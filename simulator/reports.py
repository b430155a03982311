"""Comparisons of policies for people and programs: tables and JSON. Also the plan that routers follow, as text."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.table import Table
from rich.text import Text

from router.decide.plan import Density, Plan
from simulator.engine import RunSummary
from simulator.fleet import SERVICES


def json_lines(summaries: Sequence[RunSummary]) -> str:
    """One line with a JSON object per policy; unknown values are null."""
    return "".join(msgspec.json.encode(summary).decode() + "\n" for summary in summaries)


def figures(summaries: Sequence[RunSummary]) -> Table:
    """What each policy attains and costs, one row per policy."""
    shown = table(first="policy", right=(*SERVICES, "cost", "score", "p50", "p99", "goodput", "moves"))
    for summary in summaries:
        cells = [percent(summary.attainment[name]) for name in SERVICES]
        cells += [f"${summary.cost_usd:.2f}", f"${summary.score:.2f}"]
        cells += [seconds(summary.p50), seconds(summary.p99), _rate(summary.goodput), str(summary.moves)]
        shown.add_row(summary.policy, *map(Text, cells))
    return shown


def usage(summaries: Sequence[RunSummary]) -> Table:
    """How busy each class's devices are while they are on, one row per policy."""
    classes = list(dict.fromkeys(name for summary in summaries for name in summary.utilisation))
    shown = table(first="policy", right=[f"{name} busy" for name in classes])
    for summary in summaries:
        if summary.utilisation:
            shown.add_row(summary.policy, *(Text(percent(summary.utilisation[name])) for name in classes))
    return shown


def table(*left: str, right: Sequence[str] = (), first: str | None = None) -> Table:
    """An empty table: a bold `first` column if it is named, then those on the `left`, and figures on the `right`.

    Where the terminal is too narrow, a cell goes on in the next line: a figure that is cut is another one.
    """
    shown = Table(box=None, pad_edge=False, collapse_padding=True)
    if first is not None:
        shown.add_column(first, style="bold", overflow="fold")
    for name in left:
        shown.add_column(name, overflow="fold")
    for name in right:
        shown.add_column(name, justify="right", overflow="fold")
    return shown


def percent(share: float | None) -> str:
    """A share with one decimal; a dash if there is none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def seconds(value: float | None) -> str:
    """Seconds to three digits; a dash if nothing was answered."""
    return "–" if value is None else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def plan_tables(plan: Plan) -> tuple[Table, Table]:
    """The classes of each kind of request, and how each class scales."""
    cells = table("model", "service", "locality", "classes, best first")
    for cell in plan.cells:
        cells.add_row(*map(Text, [cell.model, cell.service, cell.locality or "", ", ".join(cell.classes)]))
    classes = table("class", "rule", "devices")
    for name, planned in plan.classes.items():
        rule = planned.rule
        scales = f"density {rule.target:g}" if isinstance(rule, Density) else f"{rule.jobs:g} jobs a device"
        classes.add_row(*map(Text, [name, scales, str(planned.devices)]))
    return cells, classes
