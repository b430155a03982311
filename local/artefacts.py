"""Fetches the artefacts of models into the cache, and shows the progress."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from tasks.models.artefacts import ArtefactError, ArtefactStore
from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.queues.endpoints import ModelFile
from tasks.settings import cache_directory, models_folder, queues_file
from tasks.topology import Topology
from taxiway.errors import TaxiwayError

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


class LlamaMissingError(Exception):
    """llama.cpp cannot serve the file of `start.llama`."""


def llama_files(topology: Topology) -> dict[str, str | ModelFile]:
    """The file that llama.cpp serves for each class whose engine is started so."""
    starts = {name: one.endpoint.start for name, one in topology.hardware.items() if one.endpoint is not None}
    return {name: start.llama for name, start in starts.items() if start is not None and start.llama is not None}


def for_engines(topology: Topology, catalogue: Catalogue, classes: Collection[str]) -> list[Wanted]:
    """The models' artefacts that llama.cpp serves in these classes, if it is installed."""
    found = [file for name, file in llama_files(topology).items() if name in classes and isinstance(file, ModelFile)]
    served = [(catalogue.resolve(one.model), one.artefact) for one in found if catalogue.serves(one.model)]
    return [(model, name) for model, name in served if name in model.artefacts] if _has_llama() else []


def without_engine(topology: Topology, environment: Mapping[str, str]) -> dict[str, str]:
    """The classes whose engine cannot be started now, and why: llama.cpp is not installed, or its file not fetched."""
    reasons = {}
    for name, file in llama_files(topology).items():
        try:
            served_file(file, environment, fetching=False)
        except (LlamaMissingError, TaxiwayError) as error:
            reasons[name] = str(error)
    return reasons


def served_file(named: str | ModelFile, environment: Mapping[str, str], *, fetching: bool = True) -> Path:
    """The GGUF file that `start.llama` names, fetched if need be.

    Raises:
        ArtefactError, LlamaMissingError, TaxiwayError: it does not exist, or nothing can serve it here.
    """
    if not _has_llama():
        raise LlamaMissingError("xllamacpp, which has llama.cpp, is not installed: pip install --group llama")
    if isinstance(named, str):
        file = queues_file(environment).absolute().parent / Path(named).expanduser()
        if not file.is_file():
            raise LlamaMissingError(f"endpoint.start.llama: expected a GGUF file, got {file}, which does not exist")
        return file
    model = load_catalogue(models_folder(environment)).resolve(named.model)
    store = ArtefactStore(cache_directory(environment))
    if named.artefact not in model.artefacts:
        raise LlamaMissingError(f"endpoint.start.llama: {model.id} has no artefact {named.artefact!r}")
    if fetching:
        return store.path(model, named.artefact)
    found = store.present(model, named.artefact)
    if found is None:
        raise LlamaMissingError(f"its model is not here: python -m local fetch {named.model}")
    return found


def _has_llama() -> bool:
    return find_spec("xllamacpp") is not None


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
