"""The plan that routers follow, for people."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from router.decide.plan import Plan
from router.decide.scaling_rule import Density, ScalingRule


def plan_tables(plan: Plan) -> tuple[Table, Table]:
    """The classes of each kind of request, and how each class scales."""
    cells = _table("model", "service", "locality", "classes, best first")
    for cell in plan.cells:
        cells.add_row(*map(Text, [cell.model, cell.service, cell.locality or "", ", ".join(cell.classes)]))
    classes = _table("class", "rule", "devices")
    for name, planned in plan.classes.items():
        classes.add_row(*map(Text, [name, _rule(planned.rule), str(planned.devices)]))
    return cells, classes


def _rule(rule: ScalingRule) -> str:
    return f"density {rule.target:g}" if isinstance(rule, Density) else f"{rule.jobs:g} jobs a device"


def _table(*names: str) -> Table:
    shown = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in names:
        shown.add_column(name, no_wrap=True)
    return shown
