"""What the source says of each field of a document: the text below it, which schemas and docs/reference.md show.

A text may end with `Example: VALUE`, in YAML.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import msgspec
import yaml
from msgspec.inspect import StructType, type_info

_EXAMPLE = re.compile(r"\s+Example:\s+", re.DOTALL)


@cache
def field_texts(kind: type[msgspec.Struct]) -> Mapping[str, str]:
    """The text below each field of a struct, inherited ones included, on one line."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base is not msgspec.Struct and issubclass(base, msgspec.Struct):
            texts |= _own_texts(base)
    return texts


def described(schema: dict[str, Any], *kinds: type[Any]) -> dict[str, Any]:
    """The JSON `schema` of documents of `kinds`, with the text and example of each field."""
    for kind in set(_structs(*kinds)):
        definition = schema["$defs"][kind.__name__]
        properties = definition["properties"]
        if "description" in definition:  # a docstring, which Python 3.13 and later store without its indentation
            definition["description"] = inspect.cleandoc(definition["description"])
        names = dict(zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True))
        for field, text in field_texts(kind).items():
            name = names[field]
            description, *example = _EXAMPLE.split(text, maxsplit=1)
            properties[name]["description"] = description
            if example:
                properties[name]["examples"] = [yaml.safe_load(example[0])]
        tagged = kind.__struct_config__.tag_field
        if tagged is not None:
            properties[tagged]["description"] = inspect.cleandoc(kind.__doc__ or "")
    return schema


def _own_texts(kind: type[Any]) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts


def _structs(*kinds: Any) -> Iterator[type[msgspec.Struct]]:
    """Every struct in these types."""
    for kind in kinds:
        yield from _inside(type_info(kind))


def _inside(info: object) -> Iterator[type[msgspec.Struct]]:
    if isinstance(info, StructType):
        yield info.cls
        for field in info.fields:
            yield from _inside(field.type)
    for name in ("type", "types", "item_type", "item_types", "key_type", "value_type"):
        inner = getattr(info, name, ())
        for one in inner if isinstance(inner, tuple) else (inner,):
            yield from _inside(one)
