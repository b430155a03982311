"""The result of measuring: profile files, and a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from tasks.models.profiles import (
    DeviceProfile,
    Measurement,
    Processor,
    ProfileError,
    load_profile,
    profile_path,
    render_profile,
)


class MeasuredOutcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A measurement, or the reason why there is none: `skipped` if it was not tried, `error` if it failed."""

    model: str
    variant: str
    measurement: Measurement | None = None
    skipped: str = ""
    error: str = ""


def write(outcomes: Sequence[MeasuredOutcome], device: Processor, root: Path) -> list[Path]:
    """Write a profile file for each measured model; returns the paths.

    Variants in an older file that were not measured now are kept.
    """
    paths = []
    for model in dict.fromkeys(outcome.model for outcome in outcomes if outcome.measurement):
        path = profile_path(root, model, device)
        new = {o.variant: o.measurement for o in outcomes if o.model == model and o.measurement}
        profile = DeviceProfile(
            model=model, device=device, source="measured", variants=_kept(path, model, device) | new
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render_profile(profile), encoding="utf-8")
        paths.append(path)
    return paths


def _kept(path: Path, model: str, device: Processor) -> dict[str, Measurement]:
    """The variants of an older measurement of this model version on this device."""
    try:
        old = load_profile(path)
    except ProfileError:
        return {}
    alike = old.model == model and old.device == device and old.source == "measured"
    return dict(old.variants) if alike else {}


DISTURBED = 0.1
"""Share of timed seconds lost to other processes above which a variant is reported as disturbed."""

_COLUMNS = ("variant", "load", "memory", "seconds a batch of b rows of size s", "p50", "p95", "points")


def show(outcomes: Sequence[MeasuredOutcome], files: Sequence[Path], device: Processor, console: Console) -> None:
    """Print the fits, what could not be measured, and the files' paths."""
    table = Table(title=f"{device.kind}: {device.name}", caption="p50, p95: observed over predicted seconds")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name not in (_COLUMNS[0], _COLUMNS[3]) else "left")
    for outcome in outcomes:
        if outcome.measurement:
            table.add_row(f"{outcome.model}/{outcome.variant}", *_cells(outcome.measurement))
    if table.rows:
        console.print(table)
    for remark in remarks(outcomes):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    for path in files:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def remarks(outcomes: Sequence[MeasuredOutcome]) -> Iterator[str]:
    """A line for each variant that was skipped, failed or was disturbed."""
    for outcome in outcomes:
        name = f"{outcome.model}/{outcome.variant}"
        if outcome.skipped:
            yield f"skipped: {name}: {outcome.skipped}"
        elif outcome.error:
            yield f"failed: {name}: {outcome.error}"
        elif outcome.measurement and outcome.measurement.disturbed > DISTURBED:
            share = outcome.measurement.disturbed
            yield f"disturbed: {name}: other processes used the processor for {share:.0%} of its seconds"


def formula(found: Measurement) -> str:
    """The fitted curve without zero terms: `max(3 ms, 2 ms + 0.11 ms·b·s)`."""
    terms = ((found.base, ""), (found.step, "·s"), (found.slope, "·b·s"))
    curve = " + ".join(f"{_seconds(value)}{unit}" for value, unit in terms if value) or "0"
    return f"max({_seconds(found.floor)}, {curve})" if found.floor else curve


def _cells(found: Measurement) -> tuple[str, ...]:
    memory = f"{max(found.memory, found.peak) / 2**20:,.0f} MiB"
    ratios = (f"{found.residual.p50:.2f}", f"{found.residual.p95:.2f}")
    return (_seconds(found.load), memory, formula(found), *ratios, str(len(found.points)))


def _seconds(value: float) -> str:
    """A duration in a suitable unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns" if value else "0"
