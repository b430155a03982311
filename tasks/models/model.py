"""A model.yaml: its schema as frozen values, and the checks of what its fields say together.

A *model* is what a caller asks for; a *variant* is how it runs (runtime × precision × artefacts). A file with the field
`alias` describes no model: it gives another one, or a version of it, a second name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from tasks.document import Contradictions, DocumentError, RuntimeName, Size, Verbatim, json_schema, parse_document
from tasks.models.chats import ORDINARY
from tasks.models.tensor_spec import TensorSpec
from tasks.queues.endpoints import PROTOCOLS
from taxiway.contract.request import TERMS

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]

_SECOND_NAME = r"^(?!.*:[0-9]+$)[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9][A-Za-z0-9._:-]*)*$"
_LONGEST_SECOND = 128
SecondName = Annotated[str, msgspec.Meta(pattern=_SECOND_NAME, max_length=_LONGEST_SECOND)]
"""What OpenAI's clients may call a model: `gpt-4.1`, `llama3:8b`, `meta-llama/Llama-3.1-8B`; never like a version."""


def is_second_name(text: str) -> bool:
    """Whether a model may have this second name."""
    return len(text) <= _LONGEST_SECOND and re.fullmatch(_SECOND_NAME, text) is not None


Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class ModelError(DocumentError):
    """A model.yaml is invalid: names the file, the path inside it, what was expected and what was found."""


class Parameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One parameter that a caller may set."""

    type: Literal["integer", "number", "string", "strings"]
    """The type of its value; `strings` is a list of texts."""
    default: Any = None
    """The value where a request gives none."""
    minimum: float | None = None
    """The least value; of texts the least number of characters, of lists of entries. Example: 0"""
    maximum: float | None = None
    """The greatest value, likewise. Example: 4096"""
    help: str = ""
    """What it does, for people."""


class FetchedArtefact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """An artefact used as fetched."""

    sha256: Sha256
    """The SHA-256 of the file itself in hexadecimal, checked before it is opened."""
    licence: str = ""
    """Its licence, for people. Example: Apache-2.0"""


class WheelMember(FetchedArtefact, frozen=True, tag="pypi"):
    """One file inside a wheel of the Python package index."""

    package: str
    """The distribution. Example: silero-vad"""
    version: str
    """Its version. Example: 6.2.3"""
    member: str
    """The file's path inside the archive. Example: silero_vad/data/silero_vad.onnx"""
    archive_sha256: Sha256
    """The SHA-256 of the whole archive in hexadecimal."""


class HubFile(FetchedArtefact, frozen=True, tag="huggingface"):
    """One file of a Hugging Face repository."""

    repo: str
    """The repository. Example: sentence-transformers/all-MiniLM-L6-v2"""
    revision: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}$")]
    """A full commit hash: 40 hexadecimal digits."""
    filename: str
    """The file's path inside it. Example: onnx/model.onnx"""


class UrlFile(FetchedArtefact, frozen=True, tag="https"):
    """A file behind an https address."""

    url: Annotated[str, msgspec.Meta(pattern=r"^https://")]
    """The address. Example: https://example.com/model.onnx"""


class LocalFile(FetchedArtefact, frozen=True, tag="file"):
    """A file beside model.yaml."""

    path: str
    """Its path relative to the model's folder, which it does not leave. Example: iris.onnx"""


class Derived(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="derived"):
    """An artefact that a recipe derives once from other artefacts."""

    recipe: Name
    """The recipe's name: a file beside model.yaml, or one of `workers/recipes/`. Example: onnx-int8"""
    inputs: dict[str, str]
    """The recipe's argument names to artefacts' names. Example: {graph: graph}"""
    packages: tuple[str, ...] = ()
    """Distributions whose versions affect what it makes; they are part of the artefact's key. Example: [onnxruntime]"""
    options: dict[str, Any] = {}
    """Further arguments of the recipe."""


_FIRST_AXIS_ONLY = frozenset({"python", "jax"})
"""Runtimes that split or pad a batch along the first axis."""

Artefact = WheelMember | HubFile | UrlFile | LocalFile | Derived


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Batch latency `max(floor, base + step·size + slope·rows·size)` seconds, and load time, on one kind of device."""

    base: Seconds
    """Seconds of any batch. Example: 0.004"""
    slope: Seconds = 0.0
    """Seconds for each row and unit of size. Example: 0.0001"""
    floor: Seconds = 0.0
    """Least seconds of a batch."""
    load: Seconds = 1.0
    """Seconds to load the model."""
    step: Seconds = 0.0
    """Seconds for each unit of size whatever the rows: generation reads all weights once a token."""
    prompt_step: Seconds | None = None
    """`step` for the tokens of a prompt, which engines read at once; not given: as `step`."""
    prompt_slope: Seconds | None = None
    """`slope` for the tokens of a prompt; not given: as `slope`."""

    @property
    def of_prompt(self) -> tuple[float, float]:
        """`step` and `slope` for the tokens of a prompt."""
        step = self.step if self.prompt_step is None else self.prompt_step
        return step, self.slope if self.prompt_slope is None else self.prompt_slope

    def latency(self, rows: float, size: float, read: float = 0.0) -> float:
        """Seconds that one batch of `rows` items of mean `size` takes, of which `read` is the prompts' mean size."""
        step, slope = self.of_prompt
        reading = (step + slope * rows) * read
        return max(self.floor, self.base + (self.step + self.slope * rows) * (size - read) + reading)


class CallLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one call of a Python callable may use; a call over a limit fails alone."""

    time: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Seconds; not given: `limits.stall` of queues.yaml, and twenty times what the profile says. Example: 30"""
    memory: Size | None = None
    """Bytes that its process and all that it starts have in memory; not given: what the class lets models fill.
    Example: 2GiB"""


_NO_MEMORY = Size(0)
"""The memory of a variant that does not specify it, compared by identity."""


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a model runs: on which runtime, in which precision, from which artefacts."""

    runtime: RuntimeName
    """What runs it; an endpoint's protocol means that it runs there."""
    precision: Literal["fp32", "fp16", "bf16", "int8", "none"] = "none"
    """The type of its weights."""
    artefacts: dict[str, str] = {}
    """Artefacts' names by the role that the runtime or pipeline knows: `graph`, `weights`, `tokenizer`, `labels`,
    `head`; none on an endpoint. Example: {graph: graph}"""
    entry: str = ""
    """The network (torch, jax) or callable (python), by its file. Example: word_count"""
    memory: Size = msgspec.field(default_factory=lambda: _NO_MEMORY)
    """Bytes needed on the device; required unless it runs on an endpoint. Example: 512MiB"""
    accuracy: float | None = None
    """The figure, 0 to 1, that a request's `min_accuracy` is compared with. Example: 0.91"""
    max_batch: Positive | None = None
    """Rows of its largest batch, if less than the class's. Example: 1"""
    instruction_sets: tuple[str, ...] = ()
    """What its processor must have: features of `/proc/cpuinfo`, or `sm_80` for CUDA's compute capability 8.0 and
    above. Example: [avx512f]"""
    limits: CallLimits = CallLimits()
    """What one call may use; of callables only."""
    honours: tuple[str, ...] | None = None
    """Features of a chat that it supports; not given: the ordinary ones on an endpoint, none elsewhere. Example:
    [tools, logprobs]"""
    profiles: Annotated[dict[Literal["cpu", "cuda", "tpu", "mps", "endpoint"], Profile], msgspec.Meta(min_length=1)]
    """Its latency by the kind of device; what workers measure replaces it. Example: {cpu: {base: 0.004, slope:
    0.0001}}"""

    @property
    def on_endpoint(self) -> bool:
        """Whether it runs on an endpoint, not on a device of ours."""
        return self.runtime in PROTOCOLS

    @property
    def honoured(self) -> Collection[str]:
        """The features of a chat that it supports."""
        if self.honours is not None:
            return self.honours
        return ORDINARY if self.on_endpoint else ()

    def forwarding(self, names: Sequence[str]) -> Variant:
        """The variant on an endpoint that takes these features of a chat, too."""
        return msgspec.structs.replace(self, honours=(*self.honoured, *names)) if names else self

    def refuses(self, asks: Collection[str]) -> list[str]:
        """Which of these features of a chat it does not support."""
        return [name for name in asks if name not in self.honoured]


UnitKind = Literal["rows", "tokens", "bytes", "value", "elements", "axis"]

UNITS: tuple[UnitKind, ...] = ("rows", "tokens", "bytes")
"""Units that do not name an input; an input of the same name cannot be the unit."""

UNITS_EXPECTED = (
    "rows, tokens (of a text, generation or chat), bytes, or an input: the value of one with an integer a row, "
    "the elements that a row of another has, or the length of one axis, as in input_ids[1]"
)

_INTEGERS = ("UINT8", "INT8", "INT16", "INT32", "INT64")
_INPUT = re.compile(r"^(?P<name>[^\[\]]+)(?:\[(?P<axis>[0-9]{1,2})\])?$")


@dataclass(frozen=True, slots=True)
class Unit:
    """What a row's size counts; the last three kinds are of the input `name`, and `axis` is an axis of its row."""

    kind: UnitKind
    name: str = ""
    axis: int = 0


_UNITS: dict[str, Unit] = {word: Unit(word) for word in UNITS}


class UnitError(ValueError):
    """The text names no unit of a model with these inputs."""


def read_unit(text: str, inputs: Iterable[TensorSpec], pipeline: str) -> Unit:
    """The unit that `text` names.

    Raises:
        UnitError: it names none, or one that this kind of model lacks.
    """
    word = _UNITS.get(text)
    if word is not None:
        if word.kind == "tokens" and pipeline not in ("text", "generation", "chat"):
            raise UnitError(text)
        return word
    found = _INPUT.match(text)
    spec = next((i for i in inputs if found is not None and i.name == found["name"]), None)
    if found is None or spec is None or pipeline not in ("tensors", "image"):
        raise UnitError(text)
    return _of_input(spec, int(found["axis"]) if found["axis"] else None)


def _of_input(spec: TensorSpec, axis: int | None) -> Unit:
    batch = spec.batch_axis
    if axis is not None:
        if axis == batch or axis >= len(spec.shape):
            raise UnitError(f"{spec.name}[{axis}]")
        return Unit("axis", spec.name, axis - (batch is not None and axis > batch))
    if len(spec.shape) > (batch is not None):
        return Unit("elements", spec.name)
    if spec.datatype not in _INTEGERS:
        raise UnitError(spec.name)
    return Unit("value", spec.name)


SERVED_BY: Mapping[str, Collection[str]] = {
    "openai": ("chat", "generation", "text"),
    "oip": ("tensors",),
    "taxiway": ("tensors", "text", "image", "generation", "chat"),
}
"""The pipelines that endpoints of each protocol serve."""

ANSWER_BOUND = "max_tokens"
"""The parameter that bounds a generated answer."""

GENERATED, FINISH = "tokens", "finish-reason"
"""Outputs of a model that generates: the tokens of an answer, and why it ended."""

DISCOVERED = "endpoint"
"""The `file` of a model without a model.yaml."""


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """One version of one model."""

    # What it is called
    name: Name
    """The folder's name. Example: iris"""
    version: Positive
    """A number from 1; older versions are `model-<version>.yaml` in the same folder."""
    aliases: tuple[Name, ...] = ()
    """Names of this version, as in `iris@stable`; the bare name means the version aliased `stable`, else the newest.
    Example: [stable]"""
    summary: str
    """What it does, for people. Example: Which of three irises four measurements belong to."""
    licence: str
    """Its licence, for people. Example: MIT"""

    # What it takes and gives
    pipeline: Literal["tensors", "text", "image", "generation", "chat"]
    """What is done before and after the runtime: `tensors` are arrays in and out; `chat` and `generation` run on
    engines."""
    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    """Its inputs. Example: [{name: features, datatype: FP32, shape: [-1, 4]}]"""
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    """Its outputs. Example: [{name: probabilities, datatype: FP32, shape: [-1, 3]}]"""
    parameters: dict[str, Parameter] = {}
    """Parameters that a caller may set, by name. Example: {least: {type: integer, default: 5}}"""
    locality: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """Labels that every device on its requests' way must have, besides those that a request names. Example: ward"""
    max_rows: Positive = 1024
    """Most rows of one request."""

    # What makes a row large
    size_unit: str = "rows"
    """The unit of a row's size in profiles and buckets: `rows` (all are equal), `tokens`, `bytes`, or an input: the
    value of an integer, the elements of a tensor's row, or with `[n]` the length of axis n. Example: input_ids[1]"""
    expected_size: Positive = 1
    """The size of a row whose request does not determine it."""
    buckets: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)] = (1,)
    """Sizes up to which rows share batches, increasing; a row larger than the last is refused, or cut if tokens are
    counted. Example: [64, 256, 512]"""

    # How it runs
    artefacts: dict[str, Artefact] = {}
    """Files by name. Example: {graph: {kind: file, path: iris.onnx, sha256: …}}"""
    variants: Annotated[dict[Name, Variant], msgspec.Meta(min_length=1)]
    """Ways to run it, by name. Example: {fp32: {runtime: onnx, artefacts: {graph: graph}, memory: 16MiB, profiles:
    {cpu: {base: 0.001}}}}"""
    reference: str
    """The variant that the others are compared with. Example: fp32"""
    examples: tuple[Any, ...] = ()
    """Inputs that `make demo` submits; the first warms a loaded variant up, and `taxiway check --run` runs it. Example:
    [[5.1, 3.5, 1.4, 0.2]]"""
    folder: str = ""
    """Where it was read from: set by its reader."""
    file: str = ""
    """The file that it was read from, relative to the models folder: set by its reader."""

    # What every request asks for, worked out once

    @cached_property
    def id(self) -> str:
        """`name:version`, the exact name of this version."""
        return f"{self.name}:{self.version}"

    @cached_property
    def names(self) -> list[str]:
        """The names of its inputs, in order."""
        return [spec.name for spec in self.inputs]

    @cached_property
    def unit(self) -> Unit:
        """The unit of a row's size, already checked by its catalogue."""
        return read_unit(self.size_unit, self.inputs, self.pipeline)

    @cached_property
    def usual_outputs(self) -> tuple[str, ...]:
        """The outputs that are returned if a request names none."""
        return tuple(spec.name for spec in self.outputs if not spec.optional)

    @property
    def discovered(self) -> bool:
        """Whether it has no model.yaml and was announced by endpoints (`tasks.models.discovered`)."""
        return self.file == DISCOVERED


class Alias(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A second name of a model."""

    name: SecondName
    """The second name. Example: gpt-4.1"""
    alias: Name
    """The model's name. Example: iris"""
    version: Positive | None = None
    """The version that it names; not given: all versions and their aliases. Example: 2"""
    file: str = ""
    """The file that it was read from: set by its reader."""

    @property
    def target(self) -> str:
        """The reference that it stands for."""
        return self.alias if self.version is None else f"{self.alias}:{self.version}"

    def names(self, names: Mapping[str, Model]) -> dict[str, Model]:
        """The names that it adds to the `names` of models; empty if there is no such model."""
        if self.version is not None:
            found = names.get(self.target)
            return {} if found is None else {self.name: found, f"{self.name}:{self.version}": found}
        parts = ((name, name.removeprefix(self.alias)) for name in names if name.startswith(self.alias))
        return {self.name + rest: names[name] for name, rest in parts if rest[:1] in ("", ":", "@")}


_IS_ALIAS = re.compile(r"^alias *:", re.MULTILINE).search


def parse_file(text: str, file: str, folder: str = "") -> Model | Alias:
    """The model, or the second name of one, that the YAML `text` describes. Raises as `parse_model` does."""
    if _IS_ALIAS(text):
        return msgspec.structs.replace(parse_document(text, Alias, file=file, error=ModelError), file=file)
    return parse_model(text, file, folder)


def parse_model(text: str, file: str, folder: str = "") -> Model:
    """The model that the YAML `text` describes.

    Raises:
        ModelError: names `file`, the path inside it, what was expected and what was found.
    """
    model = parse_document(text, Model, file=file, error=ModelError)
    for path, expected, value in _contradictions(model):
        raise ModelError(file, path, expected, value)
    return msgspec.structs.replace(model, folder=folder, file=file)


def schema() -> dict[str, Any]:
    """The JSON Schema of a model.yaml."""
    return json_schema(Model, Alias)


def generates(model: Model) -> bool:
    """Whether the model generates answers of unknown length, which engines alone do."""
    return model.pipeline in ("chat", "generation")


def _contradictions(model: Model) -> Contradictions:
    if model.reference not in model.variants:
        yield "reference", f"one of the variants {sorted(model.variants)}", model.reference
    if list(model.buckets) != sorted(set(model.buckets)):
        yield "buckets", "sizes in increasing order", list(model.buckets)
    yield from _size_contradictions(model)
    yield from _tensor_contradictions("inputs", model.inputs)
    yield from _tensor_contradictions("outputs", model.outputs)
    if model.pipeline != "tensors" and any(tensor.source for tensor in (*model.inputs, *model.outputs)):
        yield "pipeline", "tensors, because an input or output has a source", model.pipeline
    yield from _batch_contradictions(model)
    for name, parameter in model.parameters.items():
        yield from _parameter_contradictions(name, parameter)
    for name, artefact in model.artefacts.items():
        yield from _artefact_contradictions(model, name, artefact)
    for name, variant in model.variants.items():
        for place, expected, value in _variant_contradictions(model, variant):
            yield f"variants.{name}.{place}", expected, value
    yield from _answer_contradictions(model)


def _variant_contradictions(model: Model, variant: Variant) -> Contradictions:
    yield from _unknown(model, variant.artefacts, "artefacts")
    if variant.runtime in ("torch", "jax", "python") and not variant.entry:
        yield "entry", f"the name of what the {variant.runtime} runtime runs", variant.entry
    if variant.runtime != "python" and variant.limits != CallLimits():
        yield "limits", "limits only with the runtime python", variant.runtime
    yield from _place_contradictions(model, variant)


def _place_contradictions(model: Model, variant: Variant) -> Contradictions:
    """Contradictions with where a variant runs: on endpoints, or on devices of ours."""
    if not variant.on_endpoint:
        if generates(model):
            expected = "openai, on a class with an endpoint: nothing generates in a worker's process"
            yield "runtime", expected, variant.runtime
        if variant.memory is _NO_MEMORY:
            yield "memory", "a value", Verbatim("nothing")
        if "endpoint" in variant.profiles:
            yield "profiles.endpoint", f"no profile, because {variant.runtime} runs on no endpoint", Verbatim("one")
        return
    if set(variant.profiles) != {"endpoint"}:
        yield "profiles", "only a profile for endpoint", sorted(variant.profiles)
    if variant.artefacts:
        yield "artefacts", f"none with the runtime {variant.runtime}", dict(variant.artefacts)
    if model.pipeline not in SERVED_BY[variant.runtime]:
        yield "runtime", f"a runtime for the pipeline {model.pipeline}", variant.runtime


def _answer_contradictions(model: Model) -> Contradictions:
    """Contradictions with what every generated answer has: a bound, a length and an end."""
    if not generates(model):
        return
    bound = model.parameters.get(ANSWER_BOUND)
    if bound is None or bound.type != "integer" or type(bound.default) is not int:
        found = Verbatim("nothing") if bound is None else msgspec.to_builtins(bound)
        yield f"parameters.{ANSWER_BOUND}", "an integer with a default, which bounds an answer", found
    names = [tensor.name for tensor in model.outputs]
    if not {GENERATED, FINISH} <= set(names):
        yield "outputs", f"{GENERATED} and {FINISH} among them", names


def _size_contradictions(model: Model) -> Contradictions:
    try:
        unit = model.unit
    except UnitError:
        yield "size_unit", UNITS_EXPECTED, model.size_unit
        return
    if unit.kind == "rows" and model.expected_size != 1:
        yield "expected_size", "1, because size_unit is rows", model.expected_size
    if unit.kind != "rows" and model.buckets == (1,):
        yield "buckets", f"sizes up to that of the largest row, because size_unit is {model.size_unit}", model.buckets
    elif model.expected_size > model.buckets[-1]:
        yield "expected_size", f"at most the last bucket, {model.buckets[-1]}", model.expected_size


def _tensor_contradictions(place: str, tensors: tuple[TensorSpec, ...]) -> Contradictions:
    for field in ("name", "called"):
        names = [getattr(tensor, field) for tensor in tensors]
        for index, name in enumerate(names):
            if names.index(name) != index:
                yield f"{place}.{index}.{field.replace('called', 'source')}", "a unique name", name
    for index, tensor in enumerate(tensors):
        axis = tensor.batch_axis
        if axis is not None and tensor.shape[axis : axis + 1] != (-1,):
            where = "-1 first" if axis == 0 else f"-1 at position {axis}"
            yield f"{place}.{index}.shape", f"{where}: the batch axis", list(tensor.shape)
        if any(n < 1 and n != -1 for n in tensor.shape):
            yield f"{place}.{index}.shape", "sizes >= 1, or -1 if they vary", list(tensor.shape)


def _batch_contradictions(model: Model) -> Contradictions:
    """Contradictions with the batch axes."""
    if all(tensor.batch_axis is None for tensor in model.inputs):
        yield "inputs", "one with a batch axis, by which rows are counted", [tensor.name for tensor in model.inputs]
    for index, tensor in enumerate(model.outputs):
        if tensor.batch_axis is None:
            yield f"outputs.{index}.batch_axis", "a batch axis: each row has an answer of its own", None
    runtimes = sorted({variant.runtime for variant in model.variants.values()} & _FIRST_AXIS_ONLY)
    tensors = [("inputs", *one) for one in enumerate(model.inputs)] + [
        ("outputs", *one) for one in enumerate(model.outputs)
    ]
    for place, index, tensor in tensors:
        reason = _first_axis_reason(model, tensor, runtimes)
        if tensor.batch_axis != 0 and reason:
            yield f"{place}.{index}.batch_axis", f"0, because {reason}", tensor.batch_axis


def _first_axis_reason(model: Model, tensor: TensorSpec, runtimes: Sequence[str]) -> str:
    """Why the tensor's batch axis must be the first; empty if it may be any."""
    if model.pipeline != "tensors":
        return f"the pipeline {model.pipeline} batches its tensors itself"
    if tensor.datatype == "BYTES":
        return "a BYTES tensor's rows are its elements"
    return f"the {runtimes[0]} runtime supports no other" if runtimes else ""


def _parameter_contradictions(name: str, parameter: Parameter) -> Contradictions:
    if name in TERMS:
        yield f"parameters.{name}", f"a name other than the service terms {sorted(TERMS)}", name
    low, high = parameter.minimum, parameter.maximum
    if low is not None and high is not None and low > high:
        yield f"parameters.{name}.minimum", f"at most the maximum, {high:g}", low


def _artefact_contradictions(model: Model, name: str, artefact: Artefact) -> Contradictions:
    if isinstance(artefact, LocalFile):
        path = PurePosixPath(artefact.path)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            yield f"artefacts.{name}.path", "a relative path that stays inside the model's folder", artefact.path
    if isinstance(artefact, Derived):
        yield from _unknown(model, artefact.inputs, f"artefacts.{name}.inputs")
        if name in sources_of(model, name):
            yield f"artefacts.{name}.inputs", "artefacts not derived from it", sorted(artefact.inputs.values())


def sources_of(model: Model, name: str) -> set[str]:
    """Every artefact that `name` is derived from, directly or not."""
    found: set[str] = set()
    left = [name]
    while left:
        artefact = model.artefacts.get(left.pop())
        new = set(artefact.inputs.values()) - found if isinstance(artefact, Derived) else set()
        found |= new
        left += new
    return found


def _unknown(model: Model, named: Mapping[str, str], path: str) -> Contradictions:
    for role, artefact in named.items():
        if artefact not in model.artefacts:
            yield f"{path}.{role}", f"one of the artefacts {sorted(model.artefacts)}", artefact
