"""Checks queues.yaml and the models, without running anything.

`workers.check` also runs the models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from tasks.models.catalogue import Catalogue
from tasks.models.discovered import with_peers
from tasks.models.files import ENTRIES, Code, CodeError, entry_code, recipe_code, runtime_code
from tasks.models.folder import load_catalogue
from tasks.models.model import Derived, Model, sources_of
from tasks.queues.endpoints import ModelFile, ServedVariant, Start
from tasks.queues.locality import joined
from tasks.queues.sealing import open_seal_keys
from tasks.settings import SettingsError, seal_keys
from tasks.topology import HardwareClass, Topology, TopologyError, load_topology
from taxiway.contract.wire import key_id
from taxiway.errors import ModelUnavailableError, UnknownModelError

Level = Literal["ok", "warning", "error"]

QUEUES = "queues.yaml"
"""The subject of verdicts on queues.yaml."""


class CheckVerdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result of checking queues.yaml, a model (`name:version`) or a variant (`name:version/variant`)."""

    subject: str
    level: Level
    text: str
    hint: str = ""


def check_configuration(queues: Path, models: Path, environment: Mapping[str, str] | None = None) -> list[CheckVerdict]:
    """The verdicts on a fleet with this queues.yaml and these models, and on the keys in `environment`."""
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
        verdicts += _sealed(topology, environment or {})
    discovers = topology is not None and any(
        one.endpoint and one.endpoint.discover for one in topology.hardware.values()
    )
    for name, reason in sorted(catalogue.disabled.items()):
        if discovers and name in catalogue.others:
            verdicts.append(CheckVerdict(subject=name, level="warning", text=reason, hint=_ANNOUNCED))
        else:
            verdicts.append(CheckVerdict(subject=name, level="error", text=reason, hint=_REPAIR))
    for _, model in sorted(catalogue.models.items()):
        verdicts += _model(model, topology)
    return verdicts


_ELSEWHERE = "correct the name, or install its package on the workers (it may be missing on this machine)"
_ANNOUNCED = "correct the name, unless an endpoint with `discover: true` announces the model"
_PLACEHOLDER = re.compile(r"(?<!\$)\{(?!host\}|port\})(\w+)\}")
_REPAIR = "the model is disabled until this is corrected; a running fleet picks up the correction"


def _topology(queues: Path) -> tuple[Topology | None, list[CheckVerdict]]:
    try:
        topology = load_topology(queues)
    except TopologyError as error:
        hint = "docs/reference.md explains every field; tasks/queues.schema.json is its JSON Schema"
        return None, [
            CheckVerdict(subject=QUEUES, level="error", text=str(error).removeprefix(f"{error.file}: "), hint=hint)
        ]
    text = f"{len(topology.hardware)} hardware classes, {len(topology.service)} services"
    return topology, [CheckVerdict(subject=QUEUES, level="ok", text=text)]


def _runtimes(topology: Topology) -> Iterator[CheckVerdict]:
    """Runtimes of classes, endpoints aside, that are neither built in nor registered by an installed package."""
    for name, hardware in sorted(topology.hardware.items()):
        for place, runtime in enumerate(hardware.runtimes if hardware.endpoint is None else ()):
            if unknown := _lacking(runtime_code, runtime):
                text = f"hardware.{name}.runtimes.{place}: {unknown}"
                yield CheckVerdict(subject=QUEUES, level="warning", text=text, hint=_ELSEWHERE)


def _lacking(find: Callable[..., Code], *names: str) -> str:
    """Why there is no such code here; empty if there is."""
    try:
        find(*names)
    except CodeError as error:
        return str(error)
    return ""


_SEALS = "TAXIWAY_SEAL_KEYS"


def _sealed(topology: Topology, environment: Mapping[str, str]) -> Iterator[CheckVerdict]:
    """The public keys of the private ones that are here, and sealed labels without the key that seals."""
    try:
        keys = open_seal_keys(seal_keys(environment), topology)
    except SettingsError as error:
        yield CheckVerdict(subject=_SEALS, level="error", text=str(error), hint="openssl rand -hex 32 makes one")
        return
    if keys is None or not keys.names:
        return
    for name, label in zip(keys.names, topology.locality.labels_of_keys(keys.names), strict=True):
        hint = "" if label else "list the public key in locality.sealed of queues.yaml"
        text = f"public key {keys.public(name).hex()} of {f'label {label}' if label else 'no label'}"
        yield CheckVerdict(subject=_SEALS, level="ok" if label else "warning", text=text, hint=hint)
    for label, newest in topology.locality.sealing(joined(*topology.locality.sealed)).items():
        if key_id(newest) not in keys.names:
            text = f"locality.sealed.{label}.0: {_SEALS} has no private key of {newest.hex()}"
            yield CheckVerdict(subject=QUEUES, level="warning", text=text, hint="workers without it get no such work")


def _named(topology: Topology, catalogue: Catalogue) -> Iterator[CheckVerdict]:
    """Models that classes should keep warm, or that endpoints should serve or start with, and cannot."""
    for name, hardware in sorted(topology.hardware.items()):
        where, endpoint = f"hardware.{name}", hardware.endpoint
        for place, reference in enumerate(hardware.warm):
            yield from _named_model(catalogue, hardware, reference, where=f"{where}.warm.{place}")
        if endpoint is None:
            continue
        for reference, served in endpoint.models.items():
            variant = served.variant if isinstance(served, ServedVariant) else None
            field = f"{where}.endpoint.models.{reference}"
            yield from _named_model(catalogue, hardware, reference, variant, where=field)
        start = endpoint.start or Start()
        if isinstance(start.llama, ModelFile):
            yield from _named_file(catalogue, start.llama, where=f"{where}.endpoint.start.llama")
        for word in sorted({*_PLACEHOLDER.findall(" ".join(start.words) + (start.ready or ""))}):
            text = f"{where}.endpoint.start: expected {{host}} or {{port}}, got {{{word}}}, which stays as it is"
            yield CheckVerdict(subject=QUEUES, level="warning", text=text)


def _named_model(
    catalogue: Catalogue, hardware: HardwareClass, reference: str, variant: str | None = None, *, where: str
) -> Iterator[CheckVerdict]:
    """Why a class cannot run a model, or its variant, that queues.yaml names for it."""
    model = _resolved(catalogue, reference, where)
    if isinstance(model, CheckVerdict):
        yield model
    elif variant is not None and variant not in model.variants:
        yield _expected(f"{where}.variant", f"a variant of {model.id}", variant, model.variants)
    elif not _runs(model, hardware):
        text = f"{where}: the class runs {', '.join(hardware.runtimes)}, and no variant of {model.id} does"
        yield CheckVerdict(subject=QUEUES, level="warning", text=text)


def _named_file(catalogue: Catalogue, file: ModelFile, *, where: str) -> Iterator[CheckVerdict]:
    """Why an engine has no file to start with."""
    model = _resolved(catalogue, file.model, f"{where}.model")
    if isinstance(model, CheckVerdict):
        yield model
    elif file.artefact not in model.artefacts:
        yield _expected(f"{where}.artefact", f"an artefact of {model.id}", file.artefact, model.artefacts)


def _resolved(catalogue: Catalogue, reference: str, where: str) -> Model | CheckVerdict:
    """The model that queues.yaml names, or what is wrong with the name."""
    try:
        return catalogue.resolve(reference)
    except UnknownModelError as error:
        names = error.details["near"]
        near = [one for one in names if ":" not in one and "@" not in one] or names
        return _expected(where, "a model of the catalogue", reference, near)
    except ModelUnavailableError as error:
        return CheckVerdict(subject=QUEUES, level="warning", text=f"{where}: {error.message}")


def _expected(where: str, what: str, got: str, meant: Collection[str]) -> CheckVerdict:
    """The verdict on a name in queues.yaml that nothing has."""
    hint = f"did you mean {' or '.join(meant)}?" if meant else ""
    return CheckVerdict(subject=QUEUES, level="error", text=f"{where}: expected {what}, got {got!r}", hint=hint)


def _runs(model: Model, hardware: HardwareClass) -> bool:
    return any(variant.runtime in hardware.runtimes for variant in model.variants.values())


def _model(model: Model, topology: Topology | None) -> Iterator[CheckVerdict]:
    """A verdict for the model, and one for each invalid variant."""
    found = [verdict for name in sorted(model.variants) for verdict in _variant(model, name)]
    if topology is not None and not any(_runs(model, hardware) for hardware in topology.hardware.values()):
        runtimes = ", ".join(sorted({variant.runtime for variant in model.variants.values()}))
        found.append(CheckVerdict(subject=model.id, level="warning", text=f"no class of queues.yaml runs {runtimes}"))
    variants = f"{len(model.variants)} variants" if len(model.variants) > 1 else "1 variant"
    yield CheckVerdict(subject=model.id, level="ok", text=variants)
    yield from found


def _variant(model: Model, name: str) -> Iterator[CheckVerdict]:
    """The code that a variant names and that does not exist here."""
    variant, subject = model.variants[name], f"{model.id}/{name}"
    if variant.runtime in ENTRIES and (reason := _lacking(entry_code, variant.runtime, variant.entry, model.folder)):
        yield CheckVerdict(subject=subject, level="error", text=f"entry: {reason}")
    if not variant.on_endpoint and (unknown := _lacking(runtime_code, variant.runtime)):
        yield CheckVerdict(subject=subject, level="warning", text=f"runtime: {unknown}", hint=_ELSEWHERE)
    for artefact in variant.artefacts.values():
        for source in sorted({artefact, *sources_of(model, artefact)}):
            made = model.artefacts[source]
            if isinstance(made, Derived) and (reason := _lacking(recipe_code, made.recipe, model.folder)):
                yield CheckVerdict(subject=subject, level="error", text=f"artefacts.{source}: {reason}")
