"""Writes the chart's values.schema.json: `python charts/schema.py`.

The chart's values are queues.yaml, by its own schema, and those of own.schema.json, which say where the fleet runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHARTS = Path(__file__).resolve().parent
WRITTEN = CHARTS / "taxiway" / "values.schema.json"


def schema() -> str:
    """The text of values.schema.json."""
    queues: dict[str, Any] = json.loads((CHARTS.parent / "tasks" / "queues.schema.json").read_text(encoding="utf-8"))
    own: dict[str, Any] = json.loads((CHARTS / "own.schema.json").read_text(encoding="utf-8"))
    topology = queues["$defs"].pop("Topology")
    values = {
        **topology,
        "$schema": queues["$schema"],
        "$defs": {**queues["$defs"], **own["$defs"]},
        "title": "Values of the chart taxiway",
        "description": "queues.yaml, and where the fleet runs.",
        "properties": {**topology["properties"], **own["properties"]},
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    WRITTEN.write_text(schema(), encoding="utf-8")
