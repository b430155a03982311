"""Models as callers see them: the list, the metadata of one, and whether it takes requests."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from router.decide.classify import Constraints, classify
from router.decide.snapshot import FleetSnapshot
from router.service.admission import UNLOADED
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model, TensorSpec, Variant
from tasks.topology import Topology
from taxiway.contract.values import BATCH_AXIS


def model_metadata(catalogue: Catalogue, model: Model) -> dict[str, Any]:
    """The protocol's model metadata, plus the parameters that the model takes."""
    return {
        "name": model.name,
        "versions": [str(m.version) for m in catalogue.versions(model.name)],
        "platform": f"taxiway_{model.pipeline}",
        "inputs": [_tensor(spec) for spec in model.inputs],
        "outputs": [_tensor(spec) for spec in model.outputs],
        "parameters": {name: msgspec.to_builtins(spec) for name, spec in model.parameters.items()},
        "summary": model.summary,
        "licence": model.licence,
    }


def model_list(catalogue: Catalogue, fleet: FleetSnapshot, unloaded: Collection[str] = ()) -> list[dict[str, Any]]:
    """Every model by name: versions and aliases, plus variants and summary of the version that the bare name means.

    A second name has the versions and variants of the model that it leads to, and that model's `alias_of`.
    `disabled` is why the bare name is not served. `problems` lists other faults: invalid files of other versions, or of
    a version still served from before its file became invalid; versions that an operator unloaded; and, by variant, why
    live devices could not load it.
    """
    names = {m.name for m in catalogue.models.values()} | {
        catalogue.bare(reference) for reference in catalogue.disabled
    }
    return [_listed(catalogue, name, fleet, unloaded) for name in sorted(names | catalogue.others.keys())]


def _listed(catalogue: Catalogue, name: str, fleet: FleetSnapshot, unloaded: Collection[str]) -> dict[str, Any]:
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
    out = {m.id: UNLOADED for m in versions if m.id in unloaded}
    problems = _problems(catalogue, name) | out | ({} if current is None else _unloadable(current, fleet))
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


def _problems(catalogue: Catalogue, name: str) -> dict[str, str]:
    """Faults in the files of a model."""
    found = {**catalogue.disabled, **catalogue.outdated}
    return {reference: why for reference, why in sorted(found.items()) if catalogue.bare(reference) == name}


def _unloadable(model: Model, fleet: FleetSnapshot) -> dict[str, str]:
    """Why live devices could not load variants of the model, by variant."""
    found: dict[str, str] = {}
    for device in fleet.devices:
        for key, why in device.unavailable.items():
            if key.partition("/")[0] == model.id:
                found.setdefault(key.partition("/")[2], f"{device.worker}: {why}")
    return found


def unready(model: Model, topology: Topology, fleet: FleetSnapshot, unloaded: Collection[str] = ()) -> str:
    """Why the model takes no requests, or no live device has or can load it; empty if one does."""
    if model.id in unloaded:
        return UNLOADED
    if fleet.stale:
        return "the fleet snapshot is stale"
    candidates, refusals = classify(model, Constraints(), topology, fleet)
    if any(candidate.devices for candidate in candidates):
        return ""
    absent = [(one.hardware_class, one.variant_name, one.absent) for one in candidates]
    refused = [(one.hardware_class, one.variant, one.reason) for one in refusals if not one.ever]
    return "; ".join(f"{name}/{variant}: {why}" for name, variant, why in absent + refused) or "no device can run it"


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    tensor = {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
    axis = {BATCH_AXIS: spec.batch_axis} if spec.batch_axis != 0 else {}
    return tensor | axis | ({"optional": True} if spec.optional else {})
