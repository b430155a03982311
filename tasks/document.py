"""Parses a YAML document into a frozen value. Errors give the file, path, expectation and value."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

import msgspec
import yaml
from msgspec import inspect

from taxiway.errors import flaw, quoted

Value = TypeVar("Value")

Contradictions = Iterator[tuple[str, str, object]]
"""Path, expectation and value of each field that contradicts another."""

RuntimeName = Annotated[
    str,
    msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64, examples=["onnx", "torch", "jax", "python", "echo"]),
]
"""A built-in runtime, or one that an installed package registers (`tasks.models.files`)."""

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"^([0-9]{1,15}(?:\.[0-9]+)?)\s*(B|KiB|MiB|GiB|TiB)$")
_FLOAT = re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
_LARGEST = 2**63 - 1
_MOST_VALUES = 100_000  # nested aliases can expand to more values than memory holds
_DEEPEST = 32
_WHERE = re.compile(r"(?s)(.*?)(?: - at `(key` in `)?\$(.*)`)?")
"""msgspec's message: the expectation, whether it is about a key, and the path."""
_PATH_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_ANY_KEY = "..."


class Verbatim(str):
    """Text that errors show in place of a value, unquoted."""

    __slots__ = ()

    __repr__ = str.__str__


class Size(int):
    """Bytes. Written as a number, or as text with a binary unit: `24GiB`, `512MiB`, `64KiB`."""

    EXPECTED: ClassVar[str] = "bytes (an integer >= 0, or text such as 512MiB or 24GiB)"


class DocumentError(ValueError):
    """A document is invalid at the dotted `path` inside `file`."""

    def __init__(self, file: str, path: str, expected: str, value: object) -> None:
        got = "nothing" if value is None else quoted(value)  # a key that is there without a value
        super().__init__(f"{file}: {path or 'document'}: expected {expected}, got {got}")
        self.file = file
        self.path = path


class _Loader(yaml.CSafeLoader):
    """Safe YAML with YAML 1.2 floats (`1e-3` is text in 1.1) and without duplicate keys.

    libyaml parses it: PyYAML's own parser took a sixth of the processor time of a router's start.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        seen: set[str] = set()
        for key in keys:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads as the same."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def parse_size(value: object) -> Size:
    """Bytes from a number or from text such as `24GiB`.

    Raises:
        ValueError: any other value.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Size(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"expected {Size.EXPECTED}")
    return Size(float(match[1]) * _UNITS[match[2]])


def read_document(path: Path, *, file: str, error: type[DocumentError]) -> str:
    """The text of a document; `file` is its name in errors.

    Raises:
        DocumentError: as `error`: the file is missing, or is not text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as wrong:
        raise error(file, "", "a readable file of UTF-8 text", Verbatim(flaw(wrong))) from wrong


def parse_document(text: str, kind: type[Value], *, file: str, error: type[DocumentError]) -> Value:
    """The `kind` that the YAML `text` describes; `file` is only named in errors.

    Raises:
        DocumentError: as `error`; also for text that is not YAML, for values that JSON cannot represent (dates,
            NaN, infinities, integers beyond 64 bits), and for duplicate keys.
    """
    raw = _read(text, file, error)
    for path, expected, value in _unsupported(raw):
        raise error(file, path, expected, value)
    try:
        return convert(raw, kind)
    except msgspec.ValidationError as wrong:
        steps, expected, value = located(raw, kind, str(wrong))
        raise error(file, ".".join(steps), expected, value) from wrong


def convert(raw: object, kind: type[Value]) -> Value:
    """`raw` (plain YAML or JSON values) as a `kind`; raises `msgspec.ValidationError`."""
    return msgspec.convert(raw, kind, dec_hook=_decode_size)


def located(raw: object, kind: type[Any], message: str) -> tuple[Sequence[str], str, object]:
    """Path, expectation and value that msgspec's `message` on `raw` as a `kind` describes."""
    text, of_key, where = cast(re.Match[str], _WHERE.fullmatch(message)).groups()
    steps = [name or index for name, index in _PATH_STEP.findall(where or "")]
    path = _resolved(raw, kind, [*steps, _ANY_KEY] if of_key else steps, message)
    types = _types(inspect.type_info(kind), raw, path[:-1] if of_key else path)
    if of_key:
        keys = [one.key_type for one in types if isinstance(one, inspect.DictType)]
        return path, f"a key that is {_expectation(text, keys)}", path[-1]
    value = _value(raw, path)
    if missing := re.search("required field `(.*)`", text):
        tags = [one.tag for one in types if isinstance(one, inspect.StructType) and one.tag_field == missing[1]]
        return [*path, missing[1]], f"one of {tags}" if tags else "a value", Verbatim("nothing")
    if unknown := re.search("unknown field `(.*)`", text):
        return [*path, unknown[1]], _known_fields(unknown[1], value, types), value[unknown[1]]
    return path, _expectation(text, types), value


def written_out(value: msgspec.Struct) -> str:
    """The YAML of a document, every default included; what is not set is left out."""

    def without_none(one: Any) -> Any:
        if isinstance(one, dict):
            return {name: without_none(inner) for name, inner in one.items() if inner is not None}
        return [without_none(inner) for inner in one] if isinstance(one, list) else one

    plain = without_none(msgspec.to_builtins(value, enc_hook=_written_size))
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def _written_size(size: object) -> int | str:
    """A `Size` by its largest unit."""
    assert isinstance(size, Size)
    exponent = next((n for n in (3, 2, 1) if size and size % 1024**n == 0), 0)
    return f"{size // 1024**exponent}{('', 'KiB', 'MiB', 'GiB')[exponent]}" if exponent else int(size)


def json_schema(*kinds: type[Any]) -> dict[str, Any]:
    """The JSON Schema of a document of one of `kinds`."""
    refs, parts = msgspec.json.schema_components(kinds, schema_hook=_size_schema, ref_template="#/$defs/{name}")
    return {**(refs[0] if len(refs) == 1 else {"anyOf": list(refs)}), "$defs": parts}


def _resolved(raw: object, kind: type[Any], steps: list[str], message: str) -> list[str]:
    """`steps` with the actual keys in place of msgspec's `...` for an item of a mapping."""
    for place in [index for index, step in enumerate(steps) if step == _ANY_KEY]:
        before = steps[:place]
        mapping = cast(dict[str, object], _value(raw, before))
        for key, value in mapping.items():
            alone = _replaced(raw, before, {key: value})
            if _fails(alone, kind, message):
                raw, steps = alone, [*before, key, *steps[place + 1 :]]
                break
    return steps


def _fails(raw: object, kind: type[Any], message: str) -> bool:
    """Whether `raw` fails as a `kind` with this `message`."""
    try:
        convert(raw, kind)
    except msgspec.ValidationError as wrong:
        return str(wrong) == message
    return False


def _replaced(raw: Any, path: Sequence[str], value: object) -> object:
    if not path:
        return value
    step, *rest = path
    if isinstance(raw, dict):
        return raw | {step: _replaced(raw[step], rest, value)}
    return [*raw[: int(step)], _replaced(raw[int(step)], rest, value), *raw[int(step) + 1 :]]


def _value(raw: Any, path: Sequence[str]) -> Any:
    for step in path:
        raw = raw[step] if isinstance(raw, dict) else raw[int(step)]
    return raw


def _types(kind: inspect.Type, raw: Any, path: Sequence[str]) -> list[inspect.Type]:
    """The types that the value at `path` may have."""
    types = _members(kind)
    for step in path:
        types = [member for one in types for inner in _inner(one, raw, step) for member in _members(inner)]
        raw = _value(raw, [step])
    return types


def _members(kind: inspect.Type) -> list[inspect.Type]:
    return list(kind.types) if isinstance(kind, inspect.UnionType) else [kind]


def _inner(kind: inspect.Type, raw: Any, step: str) -> list[inspect.Type]:
    """The types at `step` of a `kind`; empty if `raw` has another kind's tag."""
    if isinstance(kind, inspect.StructType) and isinstance(raw, dict):
        if step == kind.tag_field:
            return [inspect.LiteralType((kind.tag,))]
        return [field.type for field in kind.fields if field.encode_name == step and _is_tagged(raw, kind)]
    if isinstance(kind, inspect.DictType):
        return [kind.value_type]
    return [kind.item_type] if isinstance(kind, (inspect.VarTupleType, inspect.ListType)) else []


def _is_tagged(raw: Mapping[str, object], kind: inspect.StructType) -> bool:
    return kind.tag in (None, raw.get(kind.tag_field or ""))


def _known_fields(name: str, raw: Mapping[str, object], types: Sequence[inspect.Type]) -> str:
    """The expectation for a struct that has no field `name`."""
    structs = [one for one in types if isinstance(one, inspect.StructType) and _is_tagged(raw, one)]
    known = sorted({field.encode_name for struct in structs for field in struct.fields})
    near = difflib.get_close_matches(name, known, n=1)
    return f"no such field, but one of {known}" + (f" (did you mean {near[0]}?)" if near else "")


def _expectation(text: str, types: Sequence[inspect.Type]) -> str:
    """The expectation in msgspec's `text`, without the value; the choices, if only some values are allowed."""
    choices = [value for one in types if isinstance(one, inspect.LiteralType) for value in one.values]
    if not text.startswith("Invalid") or not choices:
        described = (one.extra_json_schema or {} for one in types if isinstance(one, inspect.Metadata))
        hint = next((f" ({one['description']})" for one in described if "description" in one), "")
        return re.sub("^([Ee]xpected|Invalid) ", "", text).partition(", got ")[0] + hint
    others = ["`int` or " for one in types if isinstance(one, inspect.IntType)]
    return f"{''.join(others)}one of {choices}"


def _decode_size(kind: type[Any], value: object) -> Size:
    if kind is Size:
        return parse_size(value)
    raise NotImplementedError(kind)


def _size_schema(kind: type[Any]) -> dict[str, Any]:
    if kind is Size:
        return {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _SIZE.pattern}]}
    raise NotImplementedError(kind)


def _read(text: str, file: str, error: type[DocumentError]) -> object:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as broken:
        mark = broken.problem_mark
        path = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise error(file, path, "YAML", Verbatim(broken.problem or broken.context or "text that is not")) from broken
    except yaml.YAMLError as broken:
        raise error(file, "", "YAML", Verbatim(str(broken).replace("\n", " "))) from broken
    except RecursionError as broken:
        raise error(file, "", f"at most {_DEEPEST} levels", Verbatim("more")) from broken
    except (ValueError, LookupError, AttributeError) as broken:
        # PyYAML's constructors raise these for `2024-13-01`, `!!int ''` and `!!timestamp x`
        raise error(file, "", "YAML", Verbatim(f"a value that cannot be read: {broken}")) from broken


def _unsupported(raw: object) -> Contradictions:
    """Path, expectation and value of what no document may contain."""
    left, seen = [("", 0, raw)], 0
    while left:
        path, depth, value = left.pop()
        seen += 1
        if seen > _MOST_VALUES or depth > _DEEPEST:
            yield path[:100], f"at most {_MOST_VALUES} values, {_DEEPEST} levels deep", Verbatim("more")
            return
        expected = _plain_expectation(value)
        if expected is not None:
            yield path, expected, value
        left += [(f"{path}.{step}".lstrip("."), depth + 1, below) for step, below in _children(value)]
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, str):
                yield f"{path}.{key}".lstrip("."), "a key that is text (put it in quotes)", key


def _children(value: object) -> list[tuple[object, object]]:
    if isinstance(value, dict):
        return list(reversed(value.items()))
    return list(reversed(list(enumerate(value)))) if isinstance(value, list) else []


def _plain_expectation(value: object) -> str | None:
    """The expectation for a scalar that JSON cannot represent; None for any other value."""
    if isinstance(value, float):
        return None if math.isfinite(value) else "a finite number"
    if isinstance(value, int):
        return None if abs(value) <= _LARGEST else "an integer of at most 64 bits"
    known = value is None or isinstance(value, (str, dict, list))
    return None if known else "text, a number, true, false, a list or a mapping (put dates in quotes)"
