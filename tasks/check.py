"""Checks queues.yaml, the models and their files on this machine, without running anything.

`workers.check` also runs the models.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from tasks.models.artefacts import ArtefactStore
from tasks.models.catalogue import Catalogue
from tasks.models.discovered import with_peers
from tasks.models.files import ENTRIES, CodeError, entry_code, runtime_code
from tasks.models.folder import graph_contradictions, load_catalogue
from tasks.models.model import Derived, Model, ModelError
from tasks.topology import HardwareClass, Topology, TopologyError, load_topology
from taxiway.errors import ModelUnavailableError, UnknownModelError

Level = Literal["ok", "warning", "error"]

QUEUES = "queues.yaml"
"""The subject of verdicts on queues.yaml."""

_HEADER = 8  # bytes of a safetensors file that give its header's length
_LONGEST_HEADER = 100 * 2**20  # bytes; the format's limit


class CheckVerdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result of checking queues.yaml, a model (`name:version`) or a variant (`name:version/variant`)."""

    subject: str
    level: Level
    text: str
    hint: str = ""


def check_configuration(queues: Path, models: Path, cache: Path) -> list[CheckVerdict]:
    """The verdicts on a fleet with this queues.yaml and these models.

    Artefacts in `cache` are checked; the others are listed as not checked.
    """
    topology, verdicts = _topology(queues)
    catalogue = load_catalogue(models)
    if topology is not None:
        catalogue = with_peers(catalogue, topology)
    if not catalogue.models and not catalogue.disabled:
        text, hint = "expected model folders, found none", "TAXIWAY_MODELS names the folder that holds them"
        verdicts.append(CheckVerdict(subject=str(models), level="error", text=text, hint=hint))
    if topology is not None:
        verdicts += _runtimes(topology)
        verdicts += _named(topology, catalogue)
    discovers = topology is not None and any(
        one.endpoint and one.endpoint.discover for one in topology.hardware.values()
    )
    for name, reason in sorted(catalogue.disabled.items()):
        if discovers and name in catalogue.others:
            verdicts.append(CheckVerdict(subject=name, level="warning", text=reason, hint=_ANNOUNCED))
        else:
            verdicts.append(CheckVerdict(subject=name, level="error", text=reason, hint=_REPAIR))
    store = ArtefactStore(cache)
    for _, model in sorted(catalogue.models.items()):
        verdicts += _model(model, topology, store)
    return verdicts


_ELSEWHERE = "correct the name, or install its package on the workers (it may be missing on this machine)"
_ANNOUNCED = "correct the name, unless an endpoint with `discover: true` announces the model"
_REPAIR = "the model is disabled until this is corrected; a running fleet picks up the correction"


def _topology(queues: Path) -> tuple[Topology | None, list[CheckVerdict]]:
    try:
        topology = load_topology(queues)
    except TopologyError as error:
        hint = "docs/operations.md explains every field; tasks/queues.schema.json is its JSON Schema"
        return None, [
            CheckVerdict(subject=QUEUES, level="error", text=str(error).removeprefix(f"{error.file}: "), hint=hint)
        ]
    text = f"{len(topology.hardware)} hardware classes, {len(topology.service)} services"
    return topology, [CheckVerdict(subject=QUEUES, level="ok", text=text)]


def _runtimes(topology: Topology) -> Iterator[CheckVerdict]:
    """Runtimes of classes, endpoints aside, that are neither built in nor registered by an installed package."""
    for name, hardware in sorted(topology.hardware.items()):
        for place, runtime in enumerate(hardware.runtimes if hardware.endpoint is None else ()):
            if unknown := _unknown(runtime):
                text = f"hardware.{name}.runtimes.{place}: {unknown}"
                yield CheckVerdict(subject=QUEUES, level="warning", text=text, hint=_ELSEWHERE)


def _unknown(runtime: str) -> str:
    """Why there is no such runtime here; empty if there is one."""
    try:
        runtime_code(runtime)
    except CodeError as error:
        return str(error)
    return ""


def _named(topology: Topology, catalogue: Catalogue) -> Iterator[CheckVerdict]:
    """Models that classes should keep warm, or that endpoints should serve, and cannot."""
    for name, hardware in sorted(topology.hardware.items()):
        warm = [(f"warm.{place}", reference) for place, reference in enumerate(hardware.warm)]
        served = (
            [] if hardware.endpoint is None else [(f"endpoint.models.{one}", one) for one in hardware.endpoint.models]
        )
        for field, reference in (*warm, *served):
            verdict = _named_model(catalogue, hardware, reference, where=f"hardware.{name}.{field}")
            if verdict is not None:
                yield verdict


def _named_model(catalogue: Catalogue, hardware: HardwareClass, reference: str, *, where: str) -> CheckVerdict | None:
    """Why a class cannot run a model that queues.yaml names for it; None if it can."""
    try:
        model = catalogue.resolve(reference)
    except UnknownModelError as error:
        names = error.details["near"]
        near = [one for one in names if ":" not in one and "@" not in one] or names
        hint = f"did you mean {' or '.join(near)}?" if near else ""
        text = f"{where}: expected a model of the catalogue, got {reference!r}"
        return CheckVerdict(subject=QUEUES, level="error", text=text, hint=hint)
    except ModelUnavailableError as error:
        return CheckVerdict(subject=QUEUES, level="warning", text=f"{where}: {error.message}")
    if _runs(model, hardware):
        return None
    text = f"{where}: the class runs {', '.join(hardware.runtimes)}, and no variant of {model.id} does"
    return CheckVerdict(subject=QUEUES, level="warning", text=text)


def _runs(model: Model, hardware: HardwareClass) -> bool:
    return any(variant.runtime in hardware.runtimes for variant in model.variants.values())


def _model(model: Model, topology: Topology | None, store: ArtefactStore) -> Iterator[CheckVerdict]:
    """A verdict for the model, and one for each invalid variant."""
    unchecked: set[str] = set()
    found = [verdict for name in sorted(model.variants) for verdict in _variant(model, name, store, unchecked)]
    if topology is not None and not any(_runs(model, hardware) for hardware in topology.hardware.values()):
        runtimes = ", ".join(sorted({variant.runtime for variant in model.variants.values()}))
        found.append(CheckVerdict(subject=model.id, level="warning", text=f"no class of queues.yaml runs {runtimes}"))
    variants = f"{len(model.variants)} variants" if len(model.variants) > 1 else "1 variant"
    missing = (
        f"; not checked, because they are not on this machine: {', '.join(sorted(unchecked))}" if unchecked else ""
    )
    yield CheckVerdict(subject=model.id, level="ok", text=f"{variants}{missing}")
    yield from found


def _variant(model: Model, name: str, store: ArtefactStore, unchecked: set[str]) -> Iterator[CheckVerdict]:
    """The defects of a variant; artefacts that are not on this machine are added to `unchecked`."""
    variant, subject = model.variants[name], f"{model.id}/{name}"
    try:
        if variant.runtime in ENTRIES:
            entry_code(variant.runtime, variant.entry, model.folder)
    except CodeError as error:
        yield CheckVerdict(subject=subject, level="error", text=f"entry: {error}")
    if not variant.on_endpoint and (unknown := _unknown(variant.runtime)):
        yield CheckVerdict(subject=subject, level="warning", text=f"runtime: {unknown}", hint=_ELSEWHERE)
    for role, artefact in variant.artefacts.items():
        try:
            path = store.present(model, artefact)
        except (CodeError, importlib.metadata.PackageNotFoundError) as error:
            yield CheckVerdict(
                subject=subject, level="error", text=f"artefacts.{artefact}: {error}", hint=_made_by(model)
            )
            continue
        if path is None:
            unchecked.add(artefact)
        elif reason := _defect(model, name, role, path):
            yield CheckVerdict(subject=subject, level="error", text=reason)


def _made_by(model: Model) -> str:
    derived = sorted({one.recipe for one in model.artefacts.values() if isinstance(one, Derived)})
    return f"made by the recipes {', '.join(derived)}; `make setup` installs what ours need"


def _defect(model: Model, variant: str, role: str, path: Path) -> str:
    """An artefact file's defect, found without reading its weights; empty if it has none."""
    if role == "graph":
        for where, expected, value in graph_contradictions(model, variant, path):
            return str(ModelError(model.file, where, expected, value))
    if role == "weights" or path.suffix == ".safetensors":
        return _safetensors_defect(path)
    return ""


def _safetensors_defect(path: Path) -> str:
    """A mismatch between a file's length and its header. Source: the format's description, huggingface/safetensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER), "little")
        header = file.read(length) if length <= _LONGEST_HEADER else b""
    try:
        tensors = [one for name, one in json.loads(header).items() if name != "__metadata__"]
        end = _HEADER + length + max((one["data_offsets"][1] for one in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"expected safetensors, got {path.name}, which has no valid header"
    size = path.stat().st_size
    return "" if size == end else f"expected {end} bytes by the header of {path.name}, got {size}"
