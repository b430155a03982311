"""Writes the JSON Schemas of queues.yaml, of model.yaml and of the chart's values: `python -m docs.schema`.

The chart's values are queues.yaml, and those of charts/own.schema.json, which say where the fleet runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from docs.described import described
from tasks import topology
from tasks.models import model
from tasks.settings import TREE

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_OWN = TREE / "charts" / "own.schema.json"


def schemas() -> Mapping[Path, str]:
    """The text of each schema by its file."""
    queues = described(topology.schema(), topology.Topology)
    return {
        TREE / "tasks" / "queues.schema.json": _text("queues.yaml", queues),
        TREE / "tasks" / "model.schema.json": _text("model.yaml", described(model.schema(), model.Model, model.Alias)),
        TREE / "charts" / "taxiway" / "values.schema.json": _text("Values of the chart taxiway", _values(queues)),
    }


def chart_values() -> dict[str, Any]:
    """The schema of the chart's own values, with the defaults of its values.yaml."""
    own: dict[str, Any] = json.loads(_OWN.read_text(encoding="utf-8"))
    defaults = yaml.safe_load((TREE / "charts" / "taxiway" / "values.yaml").read_text(encoding="utf-8"))
    _fill(own["properties"], defaults)
    return own


def _fill(properties: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Give each field that has no fields itself its default."""
    for name, default in defaults.items():
        if "properties" in properties[name]:
            _fill(properties[name]["properties"], default)
        else:
            properties[name]["default"] = default


def _values(queues: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the chart's values."""
    own, definitions = chart_values(), dict(queues["$defs"])
    fields = definitions.pop("Topology")
    return {
        **fields,
        "$defs": {**definitions, **own["$defs"]},
        "description": "queues.yaml, and where the fleet runs.",
        "properties": {**fields["properties"], **own["properties"]},
    }


def _text(title: str, schema: Mapping[str, Any]) -> str:
    return json.dumps({"$schema": DIALECT, **schema, "title": title}, indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write the files."""
    for file, text in schemas().items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
