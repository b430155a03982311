"""Returns its inputs. With `entry: paced` it first sleeps as long as a modelled accelerator would compute.

`paced` is an emulated device: it computes nothing and takes 5 ms + 0.1 ms a row on any machine, so that benchmarks of
queues and batching have a known limit (32 rows a batch: 3,902 rows/s). It is not a measure of any hardware.
`entry: paced=0.02+0.001` is another pace: 20 ms + 1 ms a row; `entry: paced=0.02+0.001,load=3` also takes 3 s to load.
"""

from __future__ import annotations

import re
import time

from taxiway.errors import ExecutionError
from workers.port import Arrays, ModelLoadError, Placed

PACED_BASE = 0.005  # seconds a batch
PACED_ROW = 0.0001  # seconds a row
PACED_ROWS = 32  # rows in the largest batch it takes


class EchoRuntime:
    """Outputs equal inputs."""

    def load(self) -> None:
        """Nothing is to be loaded."""

    def run(self, batch: Arrays) -> Arrays:
        """The batch itself."""
        return batch

    def unload(self) -> None:
        """Nothing was loaded."""

    def memory(self) -> int:
        """No bytes are held."""
        return 0


class PacedRuntime(EchoRuntime):
    """Outputs equal inputs, after `base + row · rows` seconds; `load` seconds pass before it can."""

    def __init__(self, base: float, row: float, load: float = 0.0) -> None:
        self._base, self._row, self._load = base, row, load

    def load(self) -> None:
        """Take the time of a model that is read into memory."""
        time.sleep(self._load)

    def run(self, batch: Arrays) -> Arrays:
        """The batch itself, later. Raises `ExecutionError` beyond `PACED_ROWS`."""
        rows = len(next(iter(batch.values())))
        if rows > PACED_ROWS:
            raise ExecutionError(f"expected at most {PACED_ROWS} rows in a paced batch, got {rows}")
        time.sleep(self._base + self._row * rows)
        return batch


_FORM = "paced=SECONDS+SECONDS[,load=SECONDS]"
_SECONDS = r"\d+(?:\.\d+)?"
_PACE = re.compile(rf"paced(?:=(?P<base>{_SECONDS})\+(?P<row>{_SECONDS})(?:,load=(?P<load>{_SECONDS}))?)?")


def open_variant(placed: Placed) -> EchoRuntime:
    """The runtime for one variant. Raises `ModelLoadError` for an entry that is not empty and no pace."""
    if not placed.entry:
        return EchoRuntime()
    pace = _PACE.fullmatch(placed.entry)
    if pace is None:
        raise ModelLoadError(f"{placed.variant}: expected entry paced or {_FORM}, got {placed.entry!r}")
    if pace["base"] is None:
        return PacedRuntime(PACED_BASE, PACED_ROW)
    return PacedRuntime(float(pace["base"]), float(pace["row"]), float(pace["load"] or 0))
