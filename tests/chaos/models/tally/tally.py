"""Appends a line to the file named by `TAXIWAY_NOTED` when it ran to its end."""

from __future__ import annotations

import os
from pathlib import Path


def call(number: int) -> dict[str, int]:
    """The given number; a job that ran to its end twice has two lines."""
    with Path(os.environ["TAXIWAY_NOTED"]).open("ab", buffering=0) as notes:
        notes.write(b"%d\n" % int(number))
    return {"number": int(number)}
