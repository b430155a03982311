"""Line charts over time in one SVG file for a document: a panel per measure, a line per run."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.bars import short

WIDTH = 860
_LEFT, _RIGHT, _TOP = 60, 20, 34
_HEIGHT, _GAP = 130, 52

_STYLE = """
svg{background:#fff}text{font:12px system-ui,sans-serif;fill:#667080}.title{font-size:14px;font-weight:600;fill:#1c2430}
.rule{stroke:#dde2e8}.band{fill:#f3efe3}.own{stroke:#0b6bcb;fill:none;stroke-width:2}
.other{stroke:#a0652a;fill:none;stroke-width:2;stroke-dasharray:5 4}.own-name{fill:#0b6bcb}.other-name{fill:#a0652a}
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One run's figures over time in seconds; `own` lines are highlighted."""

    name: str
    points: Sequence[tuple[float, float]]
    own: bool = False

    @property
    def kind(self) -> str:
        """The line's style."""
        return "own" if self.own else "other"


@dataclass(frozen=True, slots=True)
class Panel:
    """One measure over time."""

    title: str
    lines: Sequence[Line]


def write_lines(path: Path, panels: Sequence[Panel], *, band: tuple[float, float, str]) -> None:
    """Write the file, and print its path to stderr. `band` highlights a period in seconds, with its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture(panels, band=band), encoding="utf-8")
    sys.stderr.write(f"chart: {path}\n")


def picture(panels: Sequence[Panel], *, band: tuple[float, float, str]) -> str:
    """The SVG."""
    last = max(at for panel in panels for line in panel.lines for at, _ in line.points)
    height = len(panels) * (_HEIGHT + _GAP) + _TOP
    drawn = "".join(_panel(panel, _TOP + place * (_HEIGHT + _GAP), last, band) for place, panel in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<style>{_STYLE}</style>{drawn}</svg>\n"
    )


def _panel(panel: Panel, top: float, last: float, band: tuple[float, float, str]) -> str:
    most = 1.08 * max(figure for line in panel.lines for _, figure in line.points) or 1.0
    bottom = top + _HEIGHT

    def x(at: float) -> float:
        return _LEFT + at / last * (WIDTH - _LEFT - _RIGHT)

    def y(figure: float) -> float:
        return bottom - figure / most * _HEIGHT

    begin, end, what = band
    parts = [
        f'<rect class="band" x="{x(begin):.1f}" y="{top}" width="{x(end) - x(begin):.1f}" height="{_HEIGHT}"/>',
        _tick(x(end) - 5, bottom - 6, html.escape(what), "end"),
        f'<text class="title" x="{_LEFT}" y="{top - 8}">{html.escape(panel.title)}</text>',
        f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>',
        *(_tick(_LEFT - 6, y(figure) + 4, short(figure), "end") for figure in (0.0, most / 1.08)),
        *(_tick(x(at), bottom + 16, f"{at:g} s", "middle") for at in range(0, int(last) + 1, 30)),
    ]
    for place, line in enumerate(panel.lines):
        points = " ".join(f"{x(at):.1f},{y(figure):.1f}" for at, figure in line.points)
        parts.append(f'<polyline class="{line.kind}" points="{points}"/>')
        left = WIDTH - _RIGHT - 190 * (len(panel.lines) - place)
        parts.append(f'<text class="{line.kind}-name" x="{left}" y="{top - 8}">{html.escape(line.name)}</text>')
    return "".join(parts)


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
