"""The table that people read after measuring."""

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


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A measurement, or why there is none: `left_out` where it was not tried, `error` where it failed."""

    model: str
    variant: str
    measurement: Measurement | None = None
    left_out: str = ""
    error: str = ""


def write(outcomes: Sequence[Outcome], device: Processor, root: Path) -> list[Path]:
    """Write a file for each model that was measured; their paths.

    Variants that an older file has and that were not measured now stay in it.
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
    """The variants of an older measurement of this version of the model on this device."""
    try:
        old = load_profile(path)
    except ProfileError:
        return {}
    alike = old.model == model and old.device == device and old.source == "measured"
    return dict(old.variants) if alike else {}


DISTURBED = 0.1
"""Share of the timed seconds in which others had the processor, from which on a variant is said to be disturbed."""

_COLUMNS = ("variant", "load", "memory", "seconds a batch of b rows of size s", "p50", "p95", "points")


def show(outcomes: Sequence[Outcome], files: Sequence[Path], device: Processor, console: Console) -> None:
    """Print the fits, what could not be measured, and where the files are."""
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


def remarks(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A line for each variant that was left out, failed or was disturbed."""
    for outcome in outcomes:
        name = f"{outcome.model}/{outcome.variant}"
        if outcome.left_out:
            yield f"left out: {name}: {outcome.left_out}"
        elif outcome.error:
            yield f"failed: {name}: {outcome.error}"
        elif outcome.measurement and outcome.measurement.disturbed > DISTURBED:
            yield f"disturbed: {name}: others had the processor for {outcome.measurement.disturbed:.0%} of its seconds"


def formula(found: Measurement) -> str:
    """The fitted curve without the terms that are zero: `max(3 ms, 2 ms + 0.11 ms·b·s)`."""
    terms = ((found.base, ""), (found.step, "·s"), (found.slope, "·b·s"))
    curve = " + ".join(f"{_seconds(value)}{unit}" for value, unit in terms if value) or "0"
    return f"max({_seconds(found.floor)}, {curve})" if found.floor else curve


def _cells(found: Measurement) -> tuple[str, ...]:
    memory = f"{max(found.memory, found.peak) / 2**20:,.0f} MiB"
    ratios = (f"{found.residual.p50:.2f}", f"{found.residual.p95:.2f}")
    return (_seconds(found.load), memory, formula(found), *ratios, str(len(found.points)))


def _seconds(value: float) -> str:
    """A duration in the unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns" if value else "0"
