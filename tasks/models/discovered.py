"""Models without a model.yaml: what an endpoint announces, and the model that routers and workers make of it. Pure.

The same announcement gives an equal model everywhere, so that a job placed by a router is understood by each worker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import msgspec

from tasks.models.catalogue import Catalogue
from tasks.models.model import DISCOVERED, Alias, Model, Parameter, Profile, Variant, is_second_name
from tasks.models.tensor_spec import MOST_SOURCE, Datatype, TensorSpec
from tasks.topology import Topology

MOST_MODELS = 64
"""Models of one endpoint that are served without a model.yaml; all of them are in each heartbeat of its worker."""

MOST_TENSORS = 32
"""Inputs, and outputs, of a model that is served without a model.yaml."""

PEER = "taxiway"
"""The variant of models that another fleet runs, and the protocol between fleets."""

_BEFORE_OFFERS = Profile(base=1.0)  # that fleet's offers replace it
_LONGEST_NAME = 64
_ANSWER_TOKENS = 1024  # most tokens of an answer whose request does not say it
_NOT_NAMED = re.compile(r"[^a-z0-9]+")
_NOT_OF_TENSORS = re.compile(r"[^A-Za-z0-9_.-]+")
_SUFFIXES = (".gguf", ".onnx", ".safetensors")

_ESTIMATES: Mapping[str, Profile] = {
    "chat": Profile(base=0.2, slope=0.0005, step=0.02),
    "text": Profile(base=0.02, slope=0.0001),
    "tensors": Profile(base=0.02, slope=0.001),
}
"""First estimates, which answers correct: a model of some billions of parameters on one accelerator."""


class Announced(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an endpoint says of a model. The tensors of chats and texts are known without it.

    `context` is the most tokens of prompt and answer together, 0 if unknown. `called` is what the endpoint calls the
    model, which is its second name.
    """

    pipeline: Literal["chat", "text", "tensors"] = "chat"
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    context: int = 0
    called: str = ""


def named(calls: Iterable[str]) -> dict[str, str]:
    """A name for each model that a server calls so, and what that is; at most `MOST_MODELS`, the first in order.

    A name is the last part of the server's (`meta-llama/Llama-3.1-8B` is `llama-3-1-8b`), or all of it where another
    has that name. One that still has no name of its own is left out.
    """
    found: dict[str, str] = {}
    for called in sorted(set(calls)):
        whole = called.strip("/").lower()
        for suffix in _SUFFIXES:
            whole = whole.removesuffix(suffix)
        free = [name for name in map(_name, (whole.rpartition("/")[2], whole)) if name and name not in found]
        if free and len(found) < MOST_MODELS:
            found[free[0]] = called
    return found


def discovered(name: str, runtime: str, announced: Announced) -> Model:
    """The model of an announcement: one variant, which has the name of the endpoint's protocol."""
    return _discovered(name, runtime, msgspec.structs.replace(announced, called=""))


@lru_cache(maxsize=4096)
def _discovered(name: str, runtime: str, announced: Announced) -> Model:
    profile, shape = _ESTIMATES[announced.pipeline], _SHAPES[announced.pipeline]
    variant = Variant(runtime=runtime, profiles={"endpoint": profile})
    most = announced.context or shape.buckets[-1]
    longest = min(_ANSWER_TOKENS, max(most // 2, 1))  # an engine refuses an answer that its context cannot hold
    return msgspec.structs.replace(
        shape,
        name=name,
        reference=runtime,
        variants={runtime: variant},
        inputs=announced.inputs or shape.inputs,
        outputs=announced.outputs or shape.outputs,
        parameters={name: msgspec.structs.replace(one, default=longest) for name, one in shape.parameters.items()},
        expected_size=min(shape.expected_size, most),
        buckets=(most,),
    )


Found = Mapping[str, Model | Alias]
"""What endpoints announce, by name: models, and the second names that they have there."""


def discovered_by(announcements: Iterable[tuple[str, Mapping[str, Announced]]]) -> dict[str, Model | Alias]:
    """What endpoints announce: each with its protocol and its models. The first has a name."""
    found: dict[str, Model | Alias] = {}
    second: dict[str, Model | Alias] = {}
    for runtime, announced in announcements:
        for name, one in announced.items():
            found.setdefault(name, discovered(name, runtime, one))
            if is_second_name(one.called):
                second.setdefault(one.called, Alias(name=one.called, alias=name, file=DISCOVERED))
    return second | found


def with_discovered(catalogue: Catalogue, found: Found) -> Catalogue:
    """The catalogue, with those models whose name no model.yaml has, also no wrong one, and their second names."""
    taken = {model.name for model in catalogue.models.values()} | {*catalogue.others}
    taken |= {catalogue.bare(name) for name in catalogue.disabled}
    free = {name: one for name, one in found.items() if name not in taken}
    more = {one.id: one for one in free.values() if isinstance(one, Model)}
    if not more:
        return catalogue
    second = {name: one for name, one in free.items() if isinstance(one, Alias) and f"{one.alias}:1" in more}
    disabled = {name: why for name, why in catalogue.disabled.items() if name not in catalogue.others}
    others = {**second, **catalogue.others}
    return replace(catalogue, models={**catalogue.models, **more}, disabled=disabled, others=others)


def with_peers(catalogue: Catalogue, topology: Topology) -> Catalogue:
    """The catalogue, each model with a variant `taxiway` if a class of queues.yaml hands it to another fleet."""
    peers = [one.endpoint for one in topology.hardware.values() if one.endpoint is not None and one.endpoint.is_peer]
    handed = {
        name: _with_peer(model)
        for name, model in catalogue.models.items()
        if PEER not in model.variants and any(peer.name_of(model.name, model.version, PEER) for peer in peers)
    }
    return replace(catalogue, models={**catalogue.models, **handed}) if handed else catalogue


def _with_peer(model: Model) -> Model:
    """The model with a variant that runs there; what that honours of a chat is what some variant here does."""
    honours = tuple(sorted({name for one in model.variants.values() for name in one.honoured}))
    variant = Variant(runtime=PEER, honours=honours, profiles={"endpoint": _BEFORE_OFFERS})
    return msgspec.structs.replace(model, variants={**model.variants, PEER: variant})


def tensor(called: str, datatype: Datatype, shape: Sequence[int]) -> TensorSpec:
    """A tensor that a server calls so; in its name, `_` stands for characters that a name does not have."""
    name = _NOT_OF_TENSORS.sub("_", called).lstrip("_.-")[:_LONGEST_NAME]
    return TensorSpec(name, datatype, tuple(shape), source="" if name == called else called)


def fits(announced: Announced) -> bool:
    """Whether its rows can be distinguished: each tensor has a batch axis and a name, and there are not too many."""
    if announced.pipeline != "tensors":
        return True
    rows = all(spec.shape[:1] == (-1,) for spec in (*announced.inputs, *announced.outputs))
    return rows and all(
        0 < len(specs) <= MOST_TENSORS and _have_names(specs) for specs in (announced.inputs, announced.outputs)
    )


def _have_names(specs: Sequence[TensorSpec]) -> bool:
    names = {spec.name for spec in specs}
    return "" not in names and len(names) == len(specs) and all(len(spec.source) <= MOST_SOURCE for spec in specs)


def _name(text: str) -> str:
    return _NOT_NAMED.sub("-", text).strip("-")[:_LONGEST_NAME].strip("-")


def _one(name: str, datatype: Literal["BYTES", "INT64", "FP32"] = "BYTES", *more: int) -> TensorSpec:
    return TensorSpec(name, datatype, (-1, *more))


_MODEL = Model(
    name="discovered",
    version=1,
    summary="Served as an endpoint announces it, without a model.yaml.",
    licence="unknown",
    pipeline="tensors",
    inputs=(_one("input"),),
    outputs=(_one("output"),),
    variants={"openai": Variant(runtime="openai", profiles={"endpoint": _ESTIMATES["chat"]})},
    reference="openai",
    file=DISCOVERED,
)

_SHAPES: Mapping[str, Model] = {
    "tensors": _MODEL,
    "chat": msgspec.structs.replace(
        _MODEL,
        pipeline="chat",
        inputs=(_one("request"),),
        outputs=(_one("message"), _one("text"), _one("tokens", "INT64"), _one("finish-reason"), _one("usage")),
        parameters={"max_tokens": Parameter("integer", default=_ANSWER_TOKENS, minimum=1, maximum=2**20)},
        size_unit="tokens",
        expected_size=512,
        buckets=(2**20,),
        max_rows=64,
    ),
    "text": msgspec.structs.replace(
        _MODEL,
        pipeline="text",
        inputs=(_one("text"),),
        outputs=(_one("embedding", "FP32", -1),),
        size_unit="tokens",
        expected_size=64,
        buckets=(2**16,),
    ),
}
