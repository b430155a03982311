"""Bars on stderr: for what a running callable reports, and for the members of an array."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from taxiway.cli.show import duration
from taxiway.client.arrays import ArrayProgress, Watch
from taxiway.contract.progress import RunProgress
from taxiway.contract.stream import Event


class ProgressBar:
    """What a callable reports: the share that is done, the time left and its message. It is gone at the end."""

    def __init__(self, console: Console | None = None) -> None:
        told = [TextColumn("{task.fields[left]}"), TextColumn("{task.description}", markup=False)]
        console = console or Console(stderr=True)
        self._bar = Progress(BarColumn(), TaskProgressColumn(), *told, console=console, transient=True)
        self._task = self._bar.add_task("", total=1.0, visible=False, left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, progress: Event) -> None:
        """Show the event if it is a report."""
        if not isinstance(progress, RunProgress):
            return
        left = "" if progress.left is None else f"{duration(progress.left)} left"
        shown: dict[str, Any] = {"description": progress.message, "left": left}
        self._bar.update(self._task, completed=progress.fraction, visible=True, **shown)


@contextmanager
def array_bar() -> Iterator[Watch]:
    """A bar on stderr with an array's members that have ended, and the time left; nothing where nobody looks."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    above = sys.stdout.isatty()  # answers are printed above the bar
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=above) as bars:
        bar = bars.add_task("", total=None)

        def watch(progress: ArrayProgress) -> None:
            failed = f", {progress.failed} failed" if progress.failed else ""
            bars.update(bar, completed=progress.done, total=progress.members or None, description=f"members{failed}")

        yield watch
