"""Comparisons of policies for people and programs: tables, JSON, and one HTML page.

Also the plan that routers follow, as text. The page loads nothing from a network.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from router.decide.plan import Density, Plan, ScalingRule
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
        classes.add_row(*map(Text, [name, _rule(planned.rule), str(planned.devices)]))
    return cells, classes


def _rule(rule: ScalingRule) -> str:
    return f"density {rule.target:g}" if isinstance(rule, Density) else f"{rule.jobs:g} jobs a device"


WIDTH, HEIGHT = 960, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 20, 52
_LINE = 14
_LETTER = 6.6

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--dim:#667080;--rule:#dde2e8;--mark:#8a97a8;--own:#0b6bcb;--paper:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e8ecf2;--dim:#98a3b3;--rule:#333b47;--mark:#78879b;--own:#5aa9f5;
--paper:#14181e}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1120px;margin:32px auto;
padding:0 20px}
h1{font-size:22px;margin:0 0 4px}p{color:var(--dim);margin:0 0 20px}
svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--dim)}
svg .name{fill:var(--ink)}svg .own{fill:var(--own);font-weight:600}svg line{stroke:var(--rule)}
svg circle{fill:var(--mark)}svg circle.own{fill:var(--own)}
svg .leader{stroke:var(--mark);stroke-width:.7}
pre{font-size:13px;overflow-x:auto;margin-top:20px}
"""


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values to pixels: a linear axis from `low` to `high`."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def page(summaries: Sequence[RunSummary], *, title: str, subtitle: str) -> str:
    """The page: a chart of cost against live attainment, then the tables of `figures` and `usage`."""
    own = summaries[0].policy
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>"
        f"{_chart(summaries, own)}{_html_tables(summaries)}</body></html>\n"
    )


def _chart(summaries: Sequence[RunSummary], own: str) -> str:
    points = [s for s in summaries if s.attainment["live"] is not None]
    dearest = max((s.cost_usd for s in summaries), default=1.0) or 1.0
    across = _Scale(0.0, dearest * 1.12, _LEFT, WIDTH - _RIGHT)
    up = _Scale(0.0, 1.0, HEIGHT - _BOTTOM, _TOP)
    parts = _axes(across, up, dearest)
    dots = [(s.policy, across(s.cost_usd), up(s.attainment["live"] or 0.0)) for s in points]
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"{_own(name == own)}/>' for name, x, y in dots]
    parts += _labels(dots, own)
    label = "Cost against the share of live requests answered in time, one dot per policy"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _own(is_own: bool) -> str:
    return ' class="own"' if is_own else ""


def _axes(across: _Scale, up: _Scale, dearest: float) -> list[str]:
    parts = []
    for tenth in range(0, 11, 2):
        y = up(tenth / 10)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tenth * 10} %</text>')
    step = _round_step(dearest / 5)
    digits = 0 if step >= 1 else max(2, -math.floor(math.log10(step)))
    for number in range(int(dearest * 1.1 / step) + 1):
        x, y = across(number * step), HEIGHT - _BOTTOM + 20
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">${number * step:.{digits}f}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">cost of the run (left is cheaper)</text>')
    parts.append(f'<text x="{_LEFT + 4}" y="{_TOP - 7}">live requests answered in time (up is better)</text>')
    return parts


def _round_step(step: float) -> float:
    """The next of 1, 2, 5, 10, … times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _labels(dots: Sequence[tuple[str, float, float]], own: str) -> list[str]:
    """Names beside their dots, shifted vertically until none overlaps; a shifted one has a line to its dot."""
    parts: list[str] = []
    placed: list[tuple[float, float, float]] = [(x - 6, x + 6, y) for _, x, y in dots]
    for name, x, y in sorted(dots, key=lambda dot: (dot[2], dot[1])):
        width = len(name) * _LETTER
        left = x - width - 10 if x + width + 10 > WIDTH else x + 10
        row = next((y + step for step in _steps() if _is_free(placed, left, left + width, y + step)), y)
        placed.append((left, left + width, row))
        if abs(row - y) > 1:
            parts.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{left - 2:.1f}" y2="{row:.1f}"/>')
        kind = "name own" if name == own else "name"
        parts.append(f'<text class="{kind}" x="{left:.1f}" y="{row + 4:.1f}">{html.escape(name)}</text>')
    return parts


def _steps() -> list[int]:
    return [0] + [sign * _LINE * n for n in range(1, 60) for sign in (1, -1)]


def _is_free(placed: Sequence[tuple[float, float, float]], left: float, right: float, row: float) -> bool:
    inside = _TOP <= row <= HEIGHT - _BOTTOM
    return inside and all(right < a or left > b or abs(row - y) >= _LINE for a, b, y in placed)


def _html_tables(summaries: Sequence[RunSummary]) -> str:
    """The same tables as on a terminal."""
    console = Console(file=io.StringIO(), record=True, width=160)
    console.print(figures(summaries), "", usage(summaries), sep="\n")
    return console.export_html(code_format="<pre>{code}</pre>", inline_styles=True)
