"""What came of measuring a variant, and the profile files that are written from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

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
