"""Bar charts in one self-contained HTML page: a panel per measure, a bar per contestant."""

from __future__ import annotations

import html
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH = 1000
_NAMES, _FIGURES = 150, 190
_ROW = 24
_TOP = 6

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--dim:#667080;--rule:#dde2e8;--mark:#a9b4c2;--own:#0b6bcb;--paper:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e8ecf2;--dim:#98a3b3;--rule:#333b47;--mark:#566274;--own:#5aa9f5;
--paper:#14181e}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1120px;margin:32px auto;
padding:0 20px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:16px;margin:30px 0 2px}p{color:var(--dim);margin:0 0 8px}
svg{width:100%;height:auto}svg text{font:13px system-ui,sans-serif;fill:var(--ink)}
svg text.figure{fill:var(--dim);paint-order:stroke;stroke:var(--paper);stroke-width:4px}
svg .own{fill:var(--own);font-weight:600}svg rect{fill:var(--mark)}svg line{stroke:var(--dim)}
svg .limit{stroke:var(--own);stroke-dasharray:5 4}
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """A contestant's figure in each round; `own` bars are highlighted."""

    name: str
    figures: Sequence[float]
    own: bool = False

    @property
    def median(self) -> float:
        """The bar's length; a line over its end spans the least to the largest figure."""
        return statistics.median(self.figures)


@dataclass(frozen=True, slots=True)
class Panel:
    """One measure of all contestants; `limit` is a reference in the same unit, with its name."""

    title: str
    unit: str
    bars: Sequence[Bar]
    note: str = ""
    limit: tuple[float, str] | None = None


def write_chart(path: Path, title: str, subtitle: str, panels: Sequence[Panel]) -> None:
    """Write the page, and print its path to stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, subtitle, panels), encoding="utf-8")
    sys.stderr.write(f"chart: {path}\n")


def page(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """The page's HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>"
        f"{''.join(map(_panel, panels))}</body></html>\n"
    )


def short(figure: float) -> str:
    """Three digits, or whole above that."""
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"


def _panel(panel: Panel) -> str:
    note = f"<p>{html.escape(panel.note)}</p>" if panel.note else ""
    longest = max([*(max(bar.figures) for bar in panel.bars), panel.limit[0] if panel.limit else 0.0])
    scale = (WIDTH - _NAMES - _FIGURES) / (longest or 1.0)
    height = _TOP + _ROW * (len(panel.bars) + bool(panel.limit))
    rows = "".join(_bar(bar, _TOP + _ROW * place, scale, panel) for place, bar in enumerate(panel.bars))
    label = html.escape(f"{panel.title}, {panel.unit}")
    drawn = rows + _limit(panel, scale, height)
    return (
        f"<h2>{html.escape(panel.title)}</h2>{note}"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{drawn}</svg>'
    )


def _bar(bar: Bar, top: float, scale: float, panel: Panel) -> str:
    own, middle = ' class="own"' if bar.own else "", top + _ROW / 2
    low, high = (_NAMES + scale * figure for figure in (min(bar.figures), max(bar.figures)))
    figure = f"{short(bar.median)} {panel.unit}"
    if panel.limit:
        figure += f" · {bar.median / panel.limit[0]:.2f}"
    return (
        f'<text{own} x="{_NAMES - 8}" y="{middle + 4:.1f}" text-anchor="end">{html.escape(bar.name)}</text>'
        f'<rect{own} x="{_NAMES}" y="{top + 3:.1f}" width="{max(1.0, scale * bar.median):.1f}" height="{_ROW - 6}"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
        f'<text class="figure" x="{high + 8:.1f}" y="{middle + 4:.1f}">{html.escape(figure)}</text>'
    )


def _limit(panel: Panel, scale: float, height: float) -> str:
    if panel.limit is None:
        return ""
    x = _NAMES + scale * panel.limit[0]
    words = html.escape(f"{panel.limit[1]}: {short(panel.limit[0])} {panel.unit}")
    return (
        f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 6:.1f}"/>'
        f'<text class="figure" x="{x - 6:.1f}" y="{height - 7:.1f}" text-anchor="end">{words}</text>'
    )
