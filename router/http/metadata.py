"""What the HTTP door tells of models, devices and classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from router.classify import Constraints, classify
from router.fleet import FleetSnapshot
from tasks.catalogue import Catalogue, Model, TensorSpec
from tasks.topology import Topology
from taxiway.values import BATCH_AXIS


def model_metadata(catalogue: Catalogue, model: Model) -> dict[str, Any]:
    """The protocol's model metadata, and the parameters that the model takes."""
    return {
        "name": model.name,
        "versions": [str(m.version) for m in _versions(catalogue, model.name)],
        "platform": f"taxiway_{model.pipeline}",
        "inputs": [_tensor(spec) for spec in model.inputs],
        "outputs": [_tensor(spec) for spec in model.outputs],
        "parameters": {name: msgspec.to_builtins(spec) for name, spec in model.parameters.items()},
        "summary": model.summary,
        "licence": model.licence,
    }


def model_list(catalogue: Catalogue) -> list[dict[str, Any]]:
    """Every model by name: versions, aliases, the variants and summary of the version that the bare name means."""
    listed = []
    for name in sorted({m.name for m in catalogue.models.values()}):
        model = catalogue.resolve(name)
        variants = {
            key: {"runtime": v.runtime, "precision": v.precision, "accuracy": v.accuracy, "memory": int(v.memory)}
            for key, v in model.variants.items()
        }
        listed.append(
            {
                "name": name,
                "versions": [str(m.version) for m in _versions(catalogue, name)],
                "aliases": {alias: str(m.version) for m in _versions(catalogue, name) for alias in m.aliases},
                "variants": variants,
                "summary": model.summary,
            }
        )
    return listed


def is_ready(model: Model, topology: Topology, fleet: FleetSnapshot) -> bool:
    """Whether a live device has the model, or could load it."""
    candidates, _ = classify(model, Constraints(), topology, fleet)
    return not fleet.stale and any(c.devices for c in candidates)


def _versions(catalogue: Catalogue, name: str) -> Iterable[Model]:
    return sorted((m for m in catalogue.models.values() if m.name == name), key=lambda m: m.version)


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    tensor = {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
    axis = {BATCH_AXIS: spec.batch_axis} if spec.batch_axis != 0 else {}
    return tensor | axis | ({"optional": True} if spec.optional else {})
