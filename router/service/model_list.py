"""The list of models as callers see it."""

from __future__ import annotations

from typing import Any

from router.decide.snapshot import FleetSnapshot
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model, Variant


def model_list(catalogue: Catalogue, fleet: FleetSnapshot) -> list[dict[str, Any]]:
    """Every model by name: versions and aliases, plus variants and summary of the version that the bare name means.

    A second name has the versions and variants of the model that it leads to, and that model's `alias_of`.
    `disabled` is why the bare name is not served. `problems` lists other faults: invalid files of other versions, or of
    a version still served from before its file became invalid; and, by variant, why live devices could not load it.
    """
    names = {m.name for m in catalogue.models.values()} | {
        catalogue.bare(reference) for reference in catalogue.disabled
    }
    return [_listed(catalogue, name, fleet) for name in sorted(names | catalogue.others.keys())]


def _listed(catalogue: Catalogue, name: str, fleet: FleetSnapshot) -> dict[str, Any]:
    versions = catalogue.versions(name)
    current = catalogue.resolve(name) if catalogue.serves(name) else None
    entry = {
        "name": name,
        "versions": [str(m.version) for m in versions],
        "aliases": {alias: str(m.version) for m in versions for alias in m.aliases},
        "variants": {} if current is None else {key: _variant(v) for key, v in current.variants.items()},
        "summary": "" if current is None else current.summary,
    }
    if current is not None and name in catalogue.others:
        entry["alias_of"] = current.id
    faults = sorted({**catalogue.disabled, **catalogue.outdated}.items())
    problems = {reference: why for reference, why in faults if catalogue.bare(reference) == name}
    problems |= {} if current is None else _unloadable(current, fleet)
    if current is None and name in problems:
        entry["disabled"] = problems.pop(name)
    return entry | ({"problems": problems} if problems else {})


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "runtime": variant.runtime,
        "precision": variant.precision,
        "accuracy": variant.accuracy,
        "memory": int(variant.memory),
    }


def _unloadable(model: Model, fleet: FleetSnapshot) -> dict[str, str]:
    """Why live devices could not load variants of the model, by variant."""
    found: dict[str, str] = {}
    for device in fleet.devices:
        for key, why in device.unavailable.items():
            if key.partition("/")[0] == model.id:
                found.setdefault(key.partition("/")[2], f"{device.worker}: {why}")
    return found
