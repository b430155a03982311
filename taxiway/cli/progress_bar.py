"""Bars on stderr: for what a running callable reports, and for the members of an array."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
from taxiway.contract.job import RunProgress
from taxiway.contract.stream import Event


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Callable[[Event], None]]:
    """A bar with what a callable reports: the share that is done, the time left, its message. It is gone at the end."""
    texts = [TextColumn("{task.fields[left]}"), TextColumn("{task.description}", markup=False)]
    console = console or Console(stderr=True)
    with Progress(BarColumn(), TaskProgressColumn(), *texts, console=console, transient=True) as bars:
        bar = bars.add_task("", total=1.0, visible=False, left="")

        def show(event: Event) -> None:
            if isinstance(event, RunProgress):
                left = "" if event.left is None else f"{duration(event.left)} left"
                bars.update(bar, completed=event.fraction, visible=True, description=event.message, left=left)

        yield show


@contextmanager
def array_bar() -> Iterator[Watch]:
    """A bar on stderr with an array's members that have ended, and the time left, on a terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    above = sys.stdout.isatty()  # answers are printed above the bar
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=above) as bars:
        bar = bars.add_task("", total=None)

        def watch(progress: ArrayProgress) -> None:
            failed = f", {progress.failed} failed" if progress.failed else ""
            bars.update(bar, completed=progress.done, total=progress.members or None, description=f"members{failed}")

        yield watch
