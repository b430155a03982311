"""Tables of public data beside the checkout, of which docs/profiles.md tells."""

import csv
from pathlib import Path

import pytest

DATA = Path(__file__).parents[4] / "shared" / "data"


def table(name: str) -> Path:
    """The path of a table; skips the test where it is not there."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the public data is not here: {path.name}")
    return path


def rows_of(name: str) -> list[dict[str, str]]:
    with table(name).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))
