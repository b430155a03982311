"""Python functions of the catalogue (`runtime: python`), called row by row in a process of their own.

A callable is a function `call(**inputs) -> outputs`: one row's inputs by name as scalars or arrays (`-` in a name
becomes `_`), and a dict of its outputs by name. One with a parameter annotated `taxiway.Run` can report, and go on from
checkpoints. Only the catalogue names it, no request does.
"""

from __future__ import annotations

import hashlib
import time

import numpy as np

from tasks.models.files import CodeError, entry_code
from taxiway.errors import ExecutionError, TaxiwayError
from workers.calling.channel import CallError, NotWantedError, ProcessLostError
from workers.calling.child import Child
from workers.decide.faults import text_of
from workers.port import Arrays, ModelLoadError, Placed, RowWatch


class PythonRuntime:
    """The function `call` of `<entry>.py`, imported by a process that is started in advance."""

    def __init__(self, placed: Placed) -> None:
        self._placed = placed
        self.watch: RowWatch | None = None
        self._child: Child | None = None
        self._digest = ""

    @property
    def alive(self) -> bool:
        """Whether its process is running. Thread-safe."""
        return self._child is not None and self._child.alive

    def load(self) -> None:
        """Start the process, and wait until the function is imported. Raises `ModelLoadError`."""
        entry = self._placed.entry
        try:
            code = entry_code("python", entry, self._placed.folder)
        except CodeError as error:
            raise ModelLoadError(f"{self._placed.variant}: {error}") from error
        child = Child(code, memory=self._placed.memory)
        try:
            child.await_ready()
        except (CallError, TaxiwayError) as error:
            child.end()
            raise ModelLoadError(
                f"{self._placed.variant}: cannot import the callable {entry!r}: {text_of(error)}"
            ) from error
        self._child = child
        self._digest = hashlib.sha256(code.source.read_bytes()).hexdigest() if child.takes_run else ""

    def run(self, batch: Arrays) -> Arrays:
        """The rows' outputs, stacked; each row takes the time that it takes.

        Raises:
            NotWantedError: the row is no longer wanted.
            ExecutionError: it failed; from a `CallError`.
        """
        rows = [
            self._row({name: array[index] for name, array in batch.items()})
            for index in range(len(next(iter(batch.values()))))
        ]
        try:
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        except (KeyError, ValueError) as error:
            raise ExecutionError(f"{self._placed.variant}: rows with unlike outputs: {error}") from error

    def _row(self, inputs: Arrays) -> Arrays:
        """One row's outputs, without the batch axis."""
        if self._child is None:
            raise ExecutionError(f"{self._placed.variant} is not loaded")
        child, watch, began = self._child, self.watch, time.monotonic()

        def look() -> None:
            if watch is None:
                return
            if not watch.wanted():
                raise NotWantedError
            if time.monotonic() - began > watch.seconds:
                raise ProcessLostError(f"it did not end within {watch.seconds:g} s ({watch.limit})")

        arguments = {name.replace("-", "_"): np.asarray(value) for name, value in inputs.items()}
        try:
            if watch is None or not child.takes_run:
                return child.call(arguments, look)
            with watch.run(self._digest) as run:
                return child.call(arguments, look, run)
        except CallError as error:
            raise ExecutionError(f"{self._placed.variant}: {text_of(error)}") from error

    def unload(self) -> None:
        """End the process, and all that it started."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def memory(self) -> int:
        """Bytes that the process has in memory on the host; 0 without one."""
        return self._child.memory() if self._child is not None else 0


def open_variant(placed: Placed) -> PythonRuntime:
    """The runtime for one variant, not yet loaded."""
    return PythonRuntime(placed)
