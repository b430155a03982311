"""Fetches the artefacts of models into the cache, and shows the progress."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from tasks.models.artefacts import ArtefactError, ArtefactStore
from tasks.models.model import Model
from tasks.topology import Topology

Wanted = tuple[Model, str]
"""A model and the name of one of its artefacts."""


def for_runtimes(models: Iterable[Model], runtimes: Collection[str]) -> list[Wanted]:
    """The artefacts of every variant that one of the runtimes can run, each once."""
    wanted: dict[tuple[str, str], Wanted] = {}
    for model in models:
        for variant in model.variants.values():
            if variant.runtime in runtimes:
                wanted |= {(model.id, name): (model, name) for name in variant.artefacts.values()}
    return list(wanted.values())


def runtimes_of(topology: Topology, classes: Collection[str], installed: Collection[str]) -> set[str]:
    """The `installed` runtimes that workers of these classes use."""
    used: set[str] = {runtime for name in classes for runtime in topology.hardware[name].runtimes}
    return used & set(installed)


def fetch(wanted: Iterable[Wanted], cache: Path, console: Console) -> list[ArtefactError]:
    """Fetch or convert artefacts that the cache lacks, showing each on `console`; cached ones are only verified.

    Returns:
        The errors of the artefacts that could not be fetched; the others are fetched regardless.
    """
    failed = []
    store = ArtefactStore(cache)
    columns = (TextColumn("{task.description}"), BarColumn(), _SizeColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        show = _shown_on(bars)
        for model, name in wanted:
            try:
                store.path(model, name, show)
            except ArtefactError as error:
                failed.append(error)
    return failed


class _SizeColumn(DownloadColumn):
    """The bytes that are there; empty before the first: a conversion says its size at its end."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.completed else Text()


def _shown_on(bars: Progress) -> Callable[[str, int, int | None], None]:
    rows: dict[str, TaskID] = {}

    def show(description: str, done: int, total: int | None) -> None:
        if description not in rows:
            rows[description] = bars.add_task(description, total=None)
        bars.update(rows[description], completed=done, total=total)

    return show
