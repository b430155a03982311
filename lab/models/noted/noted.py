"""Sleeps, then notes that it ran to its end: a line in the file that `TAXIWAY_NOTED` names."""

from __future__ import annotations

import os
import time
from pathlib import Path


def call(number: int, seconds: float) -> dict[str, int]:
    """The number that was given; one that runs to its end twice is noted twice."""
    time.sleep(float(seconds))
    with Path(os.environ["TAXIWAY_NOTED"]).open("ab", buffering=0) as notes:
        notes.write(b"%d\n" % int(number))
    return {"number": int(number)}
