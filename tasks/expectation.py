"""Says what a type expects, in words, and where plain values first fail to meet it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec


class Told(str):
    """Text that errors show as it is, where a value would be shown."""

    __slots__ = ()

    __repr__ = str.__str__


NOTHING = Told("nothing")
"""What came where a field is missing."""

_WORDS: Mapping[Any, str] = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    Any: "a value",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One place at which a value is not what was expected there."""

    path: tuple[str, ...]
    expected: str
    value: object


Fits = Callable[[object, Any], bool]
"""Whether plain values convert to a type."""


def find_fault(raw: object, kind: Any, fits: Fits) -> Fault:
    """The first fault of `raw`, which does not fit `kind`: the deepest place that explains it."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    inner = next(_inner_faults(raw, plain, fits), None)
    return inner or Fault((), describe(kind), raw)


def describe(kind: Any) -> str:
    """What values of `kind` look like: "an integer >= 1", "one of ['cpu', 'cuda']"."""
    origin = get_origin(kind)
    if origin is Annotated:
        base, *constraints = get_args(kind)
        return " ".join([describe(base), *(_constraint(c) for c in constraints if isinstance(c, msgspec.Meta))])
    if origin is Literal:
        return f"one of {list(get_args(kind))}" if len(get_args(kind)) > 1 else repr(get_args(kind)[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(k) for k in get_args(kind) if k is not NoneType))
    own: str | None = getattr(kind, "EXPECTED", None)
    return own or _WORDS.get(origin or kind, "a mapping")


def _constraint(meta: msgspec.Meta) -> str:
    signs = {">": meta.gt, ">=": meta.ge, "<": meta.lt, "<=": meta.le}
    words = [f"{sign} {bound}" for sign, bound in signs.items() if bound is not None]
    if meta.pattern is not None:
        words.append(f"matching {meta.pattern}")
    if meta.min_length is not None:
        words.append(f"with at least {meta.min_length} in it")
    if meta.max_length is not None:
        words.append(f"of at most {meta.max_length} characters")
    return " and ".join(words)


def _inner_faults(raw: object, kind: Any, fits: Fits) -> Iterator[Fault]:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        yield from _union_faults(raw, [k for k in get_args(kind) if k is not NoneType], fits)
    elif isinstance(raw, dict) and isinstance(kind, msgspec.StructMeta):
        yield from _struct_faults(raw, kind, fits)
    elif isinstance(raw, dict) and origin is dict:
        key_kind, value_kind = get_args(kind)
        yield from _mapping_faults(raw, key_kind, value_kind, fits)
    elif isinstance(raw, list) and origin in (tuple, list):
        for index, value in enumerate(raw):
            yield from _below(str(index), value, get_args(kind)[0], fits)


def _mapping_faults(raw: Mapping[Any, object], key_kind: Any, value_kind: Any, fits: Fits) -> Iterator[Fault]:
    for key, value in raw.items():
        if not fits(key, key_kind):
            yield Fault((str(key),), f"a key that is {describe(key_kind)}", key)
        yield from _below(str(key), value, value_kind, fits)


def _struct_faults(raw: Mapping[Any, object], kind: type[Any], fits: Fits) -> Iterator[Fault]:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    known = [*fields, *([kind.__struct_config__.tag_field] if kind.__struct_config__.tag else [])]
    for name, value in raw.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            yield Fault((str(name),), f"no such field, but one of {sorted(known)}{hint}", value)
    for name, field in fields.items():
        if name not in raw and field.required:
            yield Fault((name,), "a value", NOTHING)
        elif name in raw:
            yield from _below(name, raw[name], field.type, fits)


def _union_faults(raw: object, kinds: list[Any], fits: Fits) -> Iterator[Fault]:
    """Faults inside the one member of a union that `raw` is meant to be, where that can be told."""
    structs = {k.__struct_config__.tag: k for k in kinds if isinstance(k, msgspec.StructMeta)}
    if len(kinds) == 1:
        yield from _inner_faults(raw, kinds[0], fits)
    elif isinstance(raw, dict) and len(structs) > 1:
        field = next(iter(structs.values())).__struct_config__.tag_field or "type"
        tag = raw.get(field, NOTHING)
        if isinstance(tag, str) and tag in structs:
            yield from _struct_faults(raw, structs[tag], fits)
        yield Fault((field,), f"one of {sorted(map(str, structs))}", tag)


def _below(step: str, value: object, kind: Any, fits: Fits) -> Iterator[Fault]:
    if not fits(value, kind):
        fault = find_fault(value, kind, fits)
        yield Fault((step, *fault.path), fault.expected, fault.value)
