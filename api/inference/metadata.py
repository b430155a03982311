"""What the protocol says of one model: its metadata, and whether it is ready. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from router.decide.classify import Constraints, classify
from router.decide.snapshot import FleetSnapshot
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model
from tasks.models.tensor_spec import TensorSpec
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


def unready(model: Model, topology: Topology, fleet: FleetSnapshot) -> str:
    """Why no live device has or can load the model; empty if one does."""
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
