"""A run of a Python callable, as the callable sees it: reports, checkpoints, and requests to yield."""

from __future__ import annotations

import math
from typing import Any

import msgspec

MOST_REPORTED = 8 * 2**10
"""Most bytes of a report: its message, and its partial result in JSON."""

_encode = msgspec.json.Encoder(enc_hook=lambda value: value.tolist()).encode  # numpy's arrays and numbers


class Run:
    """A run, for a callable that has a parameter annotated `Run`.

    `Run()` is a run without a fleet, for tests and scripts: it keeps its last checkpoint and report in memory, and goes
    on from `restored`.
    """

    def __init__(self, restored: Any = None) -> None:
        self._restored = restored
        self.reported = b""
        """The last report: fraction, message and partial result, in JSON."""

    @property
    def restored(self) -> Any:
        """The state of the last usable checkpoint of an earlier run of this job; None without one."""
        return self._restored

    @property
    def should_yield(self) -> bool:
        """Whether the device is wanted for something else, or about to go: the callable should write a checkpoint now.

        That call of `checkpoint` does not return.
        """
        return False

    def report(self, fraction: float, message: str = "", partial: Any = None) -> None:
        """Tell how far the run is. It may be called at any rate: the latest report is sent some times a second.

        Args:
            fraction: of the work, 0 to 1.
            message: a few words for people.
            partial: a first result: plain values, or small numpy arrays.

        Raises:
            ValueError: the fraction is out of range, or the report is over `MOST_REPORTED` bytes.
            TypeError: the partial result cannot be JSON.
        """
        if not 0.0 <= fraction <= 1.0 or math.isnan(fraction):
            raise ValueError(f"fraction: expected 0 to 1, got {fraction}")
        report = _encode((float(fraction), message, partial))
        if len(report) > MOST_REPORTED:
            raise ValueError(f"report: expected at most {MOST_REPORTED} bytes of JSON, got {len(report)}")
        self._post(report)

    def checkpoint(self, state: Any, *, portable: bool = True) -> bool:
        """Save a state to go on from if this run ends early; the last two are kept. One thread may call it.

        Does not return if the run is to yield (`should_yield`): it goes on later, or elsewhere, with this state.

        Args:
            state: bytes, a numpy array, a mapping of such and plain values by name, or the path of a file, whose
                content is saved. `restored` gives the same, a path to a new file for a file.
            portable: whether a device of another kind may go on with it.

        Returns:
            Whether it was saved. If not, the job's report says why, and the last one still counts.

        Raises:
            TypeError: such a state cannot be saved.
        """
        self._restored = state
        return True

    def _post(self, report: bytes) -> None:
        self.reported = report
