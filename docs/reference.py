"""Writes docs/reference.md: every field of every file that operators write (`make reference`).

The texts stand below the fields in the source (`docs.described`), those of the chart in charts/own.schema.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from api.access import Key
from docs.described import described
from docs.schema import chart_values
from tasks import topology
from tasks.document import json_schema
from tasks.models import model
from tasks.settings import TREE

PAGE = TREE / "docs" / "reference.md"

_HEAD = """# Reference

Every field of every file that operators write. `make reference` writes this page from the sources.
In editors, the JSON Schemas in `tasks/` complete and explain queues.yaml and model.yaml.
Sizes are bytes: a number, or text such as `512MiB` or `24GiB`.
"""

_FILES = """
| file | what it says | explained in |
| --- | --- | --- |
| [queues.yaml](#queuesyaml) | hardware classes, services, tenants, limits | [operations.md](operations.md#queuesyaml) |
| [model.yaml](#modelyaml) | one version of a model | [models.md](models.md) |
| [keys file](#keys-file) | who may use HTTP | [security.md](security.md#keys) |
| [values of the chart](#values-of-the-chart) | where the fleet runs on Kubernetes | [kubernetes.md](kubernetes.md) |
"""

_SIZE = "[0-9]{1,15}"  # how the pattern of a size begins


def reference() -> str:
    """The text of the page."""
    files: Mapping[str, tuple[dict[str, Any], tuple[type[Any], ...]]] = {
        "queues.yaml": (topology.schema(), (topology.Topology,)),
        "model.yaml": (model.schema(), (model.Model, model.Alias)),
        "Keys file": (json_schema(Key), (Key,)),
    }
    parts = [_HEAD, _FILES]
    for name, (schema, kinds) in files.items():
        sections = _sections(name, described(schema, *kinds)["$defs"], [kind.__name__ for kind in kinds])
        parts += [f"\n## {name}\n", *sections]
    own = chart_values()
    parts += ["\n## Values of the chart\n", *_table("values", own, own["$defs"])]
    return "".join([*parts, *_sections("values", own["$defs"], [])])


def _sections(file: str, definitions: Mapping[str, Any], first: list[str]) -> Iterator[str]:
    """A section for each definition that has fields: the `first` ones, then those that they lead to."""
    for name in [*first, *(one for one in definitions if one not in first)]:
        definition = definitions[name]
        if "properties" in definition:
            yield f"\n### {name} ({file})\n\n{_line(definition.get('description', ''))}\n"
            yield from _table(file, definition, definitions)


def _table(file: str, definition: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[str]:
    yield "\n| field | type | default | meaning |\n| --- | --- | --- | --- |\n"
    required = definition.get("required", ())
    for path, one, needed in _fields(definition["properties"], required):
        aim = definitions.get(one.get("$ref", "").rpartition("/")[2], {})
        whole = {**aim, **one} if "properties" not in aim else one
        cells = (f"`{path}`", _type(whole, file), _default(one, needed), _meaning(one))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _fields(properties: Mapping[str, Any], required: Any, above: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Path, schema and whether it is required, of each field; those inside a field follow it."""
    for name, one in properties.items():
        yield above + name, one, name in required
        yield from _fields(one.get("properties", {}), one.get("required", ()), f"{above}{name}.")


def _type(one: Mapping[str, Any], file: str) -> str:
    """What a value may be, in words."""
    if "$ref" in one and not one.keys() & {"type", "enum"}:
        name = one["$ref"].rpartition("/")[2]
        return f"[{name}](#{f'{name} {file}'.lower().replace(' ', '-').replace('.', '')})"
    if isinstance(one.get("type"), list):
        return " or ".join(_scalar({"type": kind}) for kind in one["type"])
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"] if value != "")
    if "anyOf" in one:
        choices = [choice for choice in one["anyOf"] if choice.get("type") != "null"]
        if any(_SIZE in choice.get("pattern", "") for choice in choices):
            return "size"
        return " or ".join(dict.fromkeys(_type(choice, file) for choice in choices))
    if one.get("type") == "array":
        return f"list of {_type(one.get('items') or {}, file)}"
    if one.get("type") == "object" and isinstance(one.get("additionalProperties"), dict):
        return f"mapping to {_type(one['additionalProperties'], file)}"
    return _scalar(one)


def _scalar(one: Mapping[str, Any]) -> str:
    kind = {"string": "text", "boolean": "true or false", "object": "mapping"}.get(one.get("type", ""), one.get("type"))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join([str(kind or "any"), *(f"{sign} {one[name]:g}" for name, sign in bounds.items() if name in one)])


def _default(one: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    value = one.get("default")
    return "" if value is None or value in ("", {}, []) or "$ref" in one else f"`{json.dumps(value)}`"


def _meaning(one: Mapping[str, Any]) -> str:
    examples = [f" For example `{_yaml(example)}`." for example in one.get("examples", ())]
    return _line(one.get("description", "")) + "".join(examples)


def _yaml(value: object) -> str:
    """A value on one line, as one writes it in YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_yaml(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    """Write the page."""
    PAGE.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
