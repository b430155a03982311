"""Reads a YAML document into a frozen value; what is wrong is named by file, path, expectation and value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
import yaml

Value = TypeVar("Value")

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)$")
_MESSAGE = re.compile(r"^(?P<what>.*?)(?: - at `(?:key` in `)?(?P<path>\$[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[(\.\.\.)\]")
_EXPECTED = re.compile(r"^Expected (?P<expected>.*?)(?:, got .*)?$", re.DOTALL)


class Size(int):
    """Bytes. Written as a number, or as text with a binary unit: `24GiB`, `512MiB`, `64KiB`."""


class DocumentError(ValueError):
    """A document is wrong: `path` is the place inside `file`, in dots; `expected` and `value` say why."""

    def __init__(self, file: str, path: str, expected: str, value: object) -> None:
        super().__init__(f"{file}: {path or 'document'}: expected {expected}, got {value!r}")
        self.file = file
        self.path = path
        self.expected = expected
        self.value = value


def parse_size(value: object) -> Size:
    """Bytes from a number or from text such as `24GiB`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Size(value)
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("Expected bytes: an integer >= 0, or text such as 512MiB or 24GiB")
    return Size(float(match[1]) * _UNITS[match[2]])


def parse_document(text: str, kind: type[Value], *, file: str, error: type[DocumentError]) -> Value:
    """The `kind` that the YAML `text` describes; `file` is only named in errors.

    Raises:
        DocumentError: as `error`; also for text that is not YAML, and for NaN and infinities anywhere.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as broken:
        raise error(file, "", "a YAML document", str(broken).replace("\n", " ")) from broken
    for path, number in _floats(raw, ""):
        if not math.isfinite(number):
            raise error(file, path, "a finite number", number)
    try:
        return convert(raw, kind)
    except msgspec.ValidationError as wrong:
        path, expected, value = _explain(wrong, raw, kind)
        raise error(file, path, expected, value) from wrong


def convert(raw: object, kind: type[Value]) -> Value:
    """`raw` (plain YAML or JSON values) as a `kind`; raises `msgspec.ValidationError`."""
    return msgspec.convert(raw, kind, dec_hook=_decode_size, str_keys=True)


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """The JSON Schema of a document of `kind`."""
    return msgspec.json.schema(kind, schema_hook=_size_schema)


def _decode_size(kind: type[Any], value: object) -> Size:
    if kind is Size:
        return parse_size(value)
    raise NotImplementedError(kind)


def _size_schema(kind: type[Any]) -> dict[str, Any]:
    if kind is Size:
        return {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _SIZE.pattern}]}
    raise NotImplementedError(kind)


def _floats(value: object, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _floats(below, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _floats(below, f"{path}.{index}")


def _explain(wrong: msgspec.ValidationError, raw: object, kind: type[Any]) -> tuple[str, str, object]:
    """Path, expectation and value of a validation error.

    msgspec writes `[...]` for "some key of this mapping": the key is the one that fails on its own.
    """
    match = _MESSAGE.match(str(wrong))
    what, pattern = (match["what"], match["path"] or "$") if match else (str(wrong), "$")
    path = _find(raw, kind, [next(g for g in step.groups() if g) for step in _STEP.finditer(pattern)])
    value = raw
    for step in path:
        value = value[int(step)] if isinstance(value, list) else value[step]  # type: ignore[index]  # `_find` walked it
    expected = _EXPECTED.match(what)
    return ".".join(map(str, path)), expected["expected"] if expected else what, value


def _find(raw: object, kind: type[Any], steps: list[str]) -> list[Any]:
    path: list[Any] = []
    here: Any = raw
    for step in steps:
        key = _failing_key(raw, kind, path, here) if step == "..." and isinstance(here, dict) else step
        if isinstance(here, list) and step == "...":
            return path
        path.append(key)
        here = here[int(key)] if isinstance(here, list) else here[key]
    return path


def _failing_key(raw: object, kind: type[Any], path: list[Any], here: dict[Any, Any]) -> Any:
    for key in here:
        try:
            convert(_with(raw, path, {key: here[key]}), kind)
        except msgspec.ValidationError as error:
            if "[...]" in str(error) or "key" in str(error):
                return key
    return next(iter(here))


def _with(raw: Any, path: list[Any], replacement: object) -> Any:
    """A copy of `raw` in which the value at `path` is `replacement`."""
    if not path:
        return replacement
    step, rest = path[0], path[1:]
    if isinstance(raw, list):
        return [_with(v, rest, replacement) if i == int(step) else v for i, v in enumerate(raw)]
    return {k: _with(v, rest, replacement) if k == step else v for k, v in raw.items()}
