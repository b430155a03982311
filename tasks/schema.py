"""Writes the JSON Schemas of queues.yaml and model.yaml beside this file: `python -m tasks.schema`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks import topology
from tasks.models import catalogue

FOLDER = Path(__file__).resolve().parent
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schemas() -> Mapping[str, str]:
    """The text of each schema by its file name."""
    return {
        "queues.schema.json": _text("queues.yaml", topology.schema()),
        "model.schema.json": _text("model.yaml", catalogue.schema()),
    }


def _text(title: str, schema: Mapping[str, Any]) -> str:
    return json.dumps({"$schema": DIALECT, "title": title, **schema}, indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write both files."""
    for name, text in schemas().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
