"""Two runs of the same trace, an old and a new configuration's: what the new one would have cost and attained."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from rich.table import Table
from rich.text import Text

from simulator.fleet import SERVICES
from simulator.outcome import Summary
from simulator.reports.report import percent

_DOLLARS = {"score": "score", "cost_usd": "cost", "starts_usd": "cost of starts", "idle_usd": "cost of idle devices"}


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """New minus old. Attainment is null where the service is unused in either; a class absent in one cost nothing."""

    attainment: dict[str, float | None]
    cost_usd: float
    score: float
    starts_usd: float
    idle_usd: float
    usd_by_class: dict[str, float]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `diff-config` prints."""

    old: Summary
    new: Summary
    difference: Change


def compared(old: Summary, new: Summary) -> Comparison:
    """Both runs and their difference."""
    attained = {name: _minus(new.attainment[name], old.attainment[name]) for name in SERVICES}
    dollars = {name: getattr(new, name) - getattr(old, name) for name in _DOLLARS}
    by_class = {
        name: new.usd_by_class.get(name, 0.0) - old.usd_by_class.get(name, 0.0)
        for name in dict.fromkeys([*old.usd_by_class, *new.usd_by_class])
    }
    return Comparison(old=old, new=new, difference=Change(attainment=attained, usd_by_class=by_class, **dollars))


def table(found: Comparison) -> Table:
    """One row per figure: old, new and the difference."""
    shown = Table(box=None, pad_edge=False, collapse_padding=True)
    shown.add_column("", style="bold", no_wrap=True)
    for name in ("old", "new", "difference"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in _rows(found):
        shown.add_row(*map(Text, row))
    return shown


def _rows(found: Comparison) -> Iterator[tuple[str, ...]]:
    old, new, change = found.old, found.new, found.difference
    for name in SERVICES:
        attained = percent(old.attainment[name]), percent(new.attainment[name])
        yield f"{name} in time", *attained, _points(change.attainment[name])
    for field, label in _DOLLARS.items():
        yield label, _dollars(getattr(old, field)), _dollars(getattr(new, field)), _signed(getattr(change, field))
    for name, dollars in change.usd_by_class.items():
        paid = _dollars(old.usd_by_class.get(name)), _dollars(new.usd_by_class.get(name))
        yield f"cost of {name}", *paid, _signed(dollars)


def _minus(new: float | None, old: float | None) -> float | None:
    return None if new is None or old is None else new - old


def _points(share: float | None) -> str:
    return "–" if share is None else f"{_rounded(100 * share, 1):+.1f} points"


def _dollars(value: float | None) -> str:
    return "–" if value is None else f"${_rounded(value, 2):.2f}"


def _signed(dollars: float) -> str:
    rounded = _rounded(dollars, 2)
    return f"{'-' if rounded < 0 else '+'}${abs(rounded):.2f}"


def _rounded(value: float, digits: int) -> float:
    """Rounded, and never minus zero."""
    return round(value, digits) + 0.0
