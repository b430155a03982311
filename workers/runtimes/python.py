"""Plain Python functions of the catalogue, called row by row: see `workers/callables`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from taxiway.errors import ExecutionError, TaxiwayError
from workers.runtimes import Arrays, ModelLoadError, Placed


class PythonRuntime:
    """The function `workers.callables.<entry>.call`."""

    def __init__(self, placed: Placed) -> None:
        self._placed = placed
        self._call: Callable[..., Mapping[str, Any]] | None = None

    def load(self) -> None:
        """Import the function. Raises `ModelLoadError`."""
        entry = self._placed.entry
        if not entry.isidentifier():
            raise ModelLoadError(
                f"{self._placed.variant}: expected the name of a module of workers/callables, got {entry!r}"
            )
        try:
            self._call = importlib.import_module(f"workers.callables.{entry}").call
        except (ImportError, AttributeError) as error:
            raise ModelLoadError(f"{self._placed.variant}: no callable {entry!r}: {error}") from error

    def run(self, batch: Arrays) -> Arrays:
        """The rows' outputs, stacked. Raises `ExecutionError`, naming the row."""
        if self._call is None:
            raise ExecutionError(f"{self._placed.variant} is not loaded")
        names = {name: name.replace("-", "_") for name in batch}
        rows = len(next(iter(batch.values())))
        answers = [self._row(row, {names[name]: array[row] for name, array in batch.items()}) for row in range(rows)]
        return {name: np.stack([np.asarray(answer[name]) for answer in answers]) for name in answers[0]}

    def unload(self) -> None:
        """Forget the function."""
        self._call = None

    def memory(self) -> int:
        """No bytes are held between calls."""
        return 0

    def _row(self, row: int, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        assert self._call is not None
        try:
            return self._call(**inputs)
        except TaxiwayError:
            raise
        except Exception as error:  # whatever a lab's own code raises
            raise ExecutionError(f"{self._placed.variant}: row {row}: {type(error).__name__}: {error}") from error


def open_variant(placed: Placed) -> PythonRuntime:
    """The runtime for one variant, not yet loaded."""
    return PythonRuntime(placed)
