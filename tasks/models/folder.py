"""The models folder as a process sees it: its catalogue and profiles, read again when files change, and reported.

A model whose files beside model.yaml are not what that says is disabled, with the reason.

A change is detected by sizes, times and inodes of the files behind links, so that a mounted folder whose links are
swapped (a Kubernetes ConfigMap) counts as changed. Readers take whole immutable values, which `look` replaces.

Each process calls `broker.valkey.processes.watch_call` once per second, with its report if that changed. A report
expires a minute after its process's last call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from tasks.document import Contradictions, read_document
from tasks.models.catalogue import Catalogue, dangling, folder_of
from tasks.models.discovered import Found, with_discovered, with_peers
from tasks.models.files import Stamp, local_sha256, stamp_of
from tasks.models.model import Alias, LocalFile, Model, ModelError, parse_file, sources_of
from tasks.models.profiles import ProfileBook, ProfileError, load_book
from tasks.queues.queues_file import QueuesFile

logger = logging.getLogger(__name__)

CHECK_EVERY = 1.0
"""Seconds between two checks of the folder."""


class ModelsFolder:
    """One process's catalogue and profiles. Thread-safe.

    Args:
        root: the folder of the models' folders.
        queues: the process's queues.yaml, which is looked at together with the folder.

    `discovered` are models that endpoints serve without a model.yaml, by name, which the next look adds.
    """

    def __init__(self, root: Path, queues: QueuesFile) -> None:
        self.root = root
        self.catalogue = self._written = Catalogue({})
        self.discovered: Found = {}
        self._added: Found = {}
        self.book = ProfileBook()
        self.queues = queues
        self._broken_profiles: tuple[ProfileError, ...] = ()
        self._turn = threading.Lock()
        self._follower: Callable[[Catalogue, ProfileBook], None] = lambda catalogue, book: None
        self._stamps = self._stamp(self._written)
        self._read()

    def follow(self, follower: Callable[[Catalogue, ProfileBook], None]) -> None:
        """Call `follower` with each new catalogue and its profiles, on the thread that checks the folder."""
        self._follower = follower

    def log_problems(self) -> None:
        """Log the folder's problems, once logging is set up; later problems are logged when they appear."""
        _log(Catalogue({}), self.catalogue)
        self._log_profiles()

    def look(self) -> bool:
        """Read what changed since the last check; returns whether anything differs now."""
        with self._turn:
            renewed = self.queues.look()
            if not self.root.is_dir() and self._stamps:
                return renewed  # a mount that is missing for a moment does not remove its models
            stamps = self._stamp(self._written)
            if stamps == self._stamps and self.discovered == self._added and not renewed:
                return renewed
            before, known = self.catalogue, self.book
            self._stamps = stamps
            self._read()
            _log(before, self.catalogue)
            changed = _served(before) != _served(self.catalogue) or known != self.book
            if changed:
                self._log_profiles()
                self._follower(self.catalogue, self.book)
            return changed or renewed

    def _stamp(self, catalogue: Catalogue) -> dict[Path, Stamp | None]:
        """The stamps of all files that the catalogue and the profiles are read from; None for a missing one."""
        found = {*self.root.glob("*/model*.yaml"), *self.root.glob("*/profiles/*.yaml"), *catalogue.files}
        return {path: stamp_of(path) for path in found}

    def _read(self) -> None:
        """Read everything; files that change meanwhile differ from `stamps` and are read again."""
        self._written, self._added = load_catalogue(self.root, self._written, self.discovered), self.discovered
        self.catalogue = with_peers(with_discovered(self._written, self._added), self.queues.topology)
        self.book, self._broken_profiles = load_book(self.root)
        self._stamps = {**self._stamp(self._written), **self._stamps}

    def _log_profiles(self) -> None:
        """Log the profiles that cannot be read: their devices get a warning, and the process starts."""
        for error in self._broken_profiles:
            logger.warning("a profile cannot be read", extra={"error": str(error)})


_served = attrgetter("models", "disabled", "outdated", "others")
"""What of a catalogue is served, and by which names."""


def _log(before: Catalogue, after: Catalogue) -> None:
    for name, reason in after.disabled.items():
        if before.disabled.get(name) != reason:
            logger.error("model disabled", extra={"model": name, "reason": reason})
    for name, reason in after.outdated.items():
        if before.outdated.get(name) != reason:
            logger.error("model kept in its last valid version: file is wrong", extra={"model": name, "reason": reason})
    if before.models:
        old, new = before.models, after.models
        differ = {
            "added": sorted(new.keys() - old.keys()),
            "replaced": sorted(name for name in new.keys() & old.keys() if new[name] is not old[name]),
            "removed": sorted(old.keys() - new.keys()),
        }
        if any(differ.values()):
            logger.info("models changed", extra=differ)


LIVE = 5
"""Seconds since its last call within which a process counts as running."""

APART = 2
"""Seconds by which a host's clock may differ from the store's: an answer that came late looks like a second."""


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a process says of itself."""

    kind: Literal["router", "worker"]
    queues_changed: bool = False
    """Its queues.yaml says more by now than it uses without a restart."""
    queues_wrong: str = ""
    """Why that file is invalid by now."""
    plan: int = 0
    """Number of the plan that a router follows, 0 without one."""
    clock: int = 0
    """Seconds that the host's clock is ahead of the store's."""


class Watched(NamedTuple):
    """The answer to a process's call: whether the store has its report, and its time."""

    known: bool
    now: float


class Reporter:
    """Makes one process's arguments for `watch_call`, and follows its answers. For one thread at a time.

    `plan` is reported as it was last set.
    """

    def __init__(self, queues: QueuesFile, kind: Literal["router", "worker"], process: str) -> None:
        self._queues = queues
        self._kind = kind
        self._process = process
        self._known = b""
        self._sent = b""
        self._clock = 0
        self.plan = 0

    def arguments(self) -> Sequence[str | bytes]:
        """The process's name and its report; empty if the store already has it."""
        self._sent = msgspec.json.encode(
            ProcessReport(
                kind=self._kind,
                queues_changed=self._queues.differs,
                queues_wrong=self._queues.wrong,
                plan=self.plan,
                clock=self._clock,
            )
        )
        return self._process, b"" if self._sent == self._known else self._sent

    def apply(self, answer: Watched) -> None:
        """Apply the answer."""
        self._clock = round(time.time() - answer.now)
        self._known = self._sent if answer.known else b""


def load_catalogue(root: Path, last: Catalogue | None = None, discovered: Collection[str] = ()) -> Catalogue:
    """The models that `model*.yaml` describe one folder below `root`; one that is wrong is disabled, with the reason.

    Where two files claim the same version or alias, `model.yaml` has it, then the first by file name; the other is
    disabled. What `last` served and what is wrong now is served in its last valid version, and `outdated` says what is
    wrong. A second name may also be one of a model in `discovered`, given by name.
    """
    loading = _Loading(root, last or Catalogue({}), discovered)
    for path in sorted(root.glob("*/model*.yaml"), key=lambda path: (path.parent, path.name != _CURRENT, path.name)):
        if not path.parent.name.startswith("."):  # Kubernetes keeps the folders that its links lead to there
            loading.add(path)
    return loading.catalogue


class _Loading:
    """The catalogue of a folder as its files are read, in the order in which they win a clash."""

    def __init__(self, root: Path, last: Catalogue, discovered: Collection[str]) -> None:
        self._root = root
        self._last = {model.file: model for model in last.models.values()}
        self._last_others = {alias.file: alias for alias in last.others.values()}
        self._discovered = discovered
        self._others: dict[str, Alias] = {}
        self._models: dict[str, Model] = {}
        self._aliases: dict[str, Model] = {}
        self._disabled: dict[str, str] = {}
        self._outdated: dict[str, str] = {}
        self._files: set[Path] = set()

    @property
    def catalogue(self) -> Catalogue:
        others = {alias.name: self._led(alias) for alias in self._others.values()}
        return Catalogue(self._models, self._disabled, self._outdated, self._files, others)

    def add(self, path: Path) -> None:
        """Take in one file's model, or why there is none."""
        file = str(path.relative_to(self._root))
        served = self._last.get(file)
        try:
            model = self._read(path, file)
        except ModelError as error:
            self._keep(path, file, served, error)
        else:
            if isinstance(model, Alias):
                self._others[model.name] = model
            else:
                self._take(model if model != served else served)  # who holds the old object sees that nothing changed

    def _keep(self, path: Path, file: str, served: Model | None, error: ModelError) -> None:
        """Keep the last valid content of a wrong file; disable its model if there is none."""
        alias = self._last_others.get(file)
        if served is not None and self._fault(served) is None:
            self._outdated[served.id] = str(error)
            self._take(served)
        elif alias is not None:
            self._outdated[alias.name] = str(error)
            self._others[alias.name] = alias
        else:
            self._disabled[_reference(path)] = str(error)

    def _led(self, alias: Alias) -> Alias:
        """The alias, or the one that its file had before if it leads nowhere and that does not."""
        before = self._last_others.get(alias.file)
        if not self._leads(alias) and before is not None and self._leads(before):
            self._outdated[alias.name] = str(dangling(alias))
            return before
        return alias

    def _leads(self, alias: Alias) -> bool:
        known = self._models.keys() | {model.name for model in self._models.values()} | set(self._discovered)
        return alias.target in known

    def _read(self, path: Path, file: str) -> Model | Alias:
        model = _parsed(read_document(path, file=file, error=ModelError), file, str(path.parent))
        if folder_of(model.name) != path.parent.name:
            raise ModelError(file, "name", f"the folder's name {path.parent.name!r}", model.name)
        if isinstance(model, Alias):
            if path.name != _CURRENT:
                raise ModelError(file, "alias", f"an alias only in a {_CURRENT}", model.alias)
            return model
        if model.name in self._others:
            raise ModelError(file, "name", f"no model beside the alias in {self._others[model.name].file}", model.name)
        local = (artefact for artefact in model.artefacts.values() if isinstance(artefact, LocalFile))
        self._files |= {path.parent / artefact.path for artefact in local}
        for where, expected, value in _file_contradictions(model):
            raise ModelError(file, where, expected, value)
        if (fault := self._fault(model)) is not None:
            raise fault
        return model

    def _fault(self, model: Model) -> ModelError | None:
        """What the model claims and another file has."""
        other = self._models.get(model.id)
        if other is not None:
            return ModelError(model.file, "version", f"a version that {other.file} does not have", model.version)
        for alias in model.aliases:
            other = self._aliases.get(f"{model.name}@{alias}")
            if other is not None:
                return ModelError(model.file, "aliases", f"no alias of {other.id} in {other.file}", alias)
        return None

    def _take(self, model: Model) -> None:
        self._models[model.id] = model
        self._aliases |= {f"{model.name}@{alias}": model for alias in model.aliases}


_parsed = lru_cache(maxsize=1024)(parse_file)
"""The same object for the same text, which is not parsed again: a changed file among many costs only its own time."""

_CURRENT = "model.yaml"


def _reference(path: Path) -> str:
    """The name by which the model of a file is requested, as far as the file's name determines it."""
    return path.parent.name if path.name == _CURRENT else f"{path.parent.name}:{path.stem.removeprefix('model-')}"


def _file_contradictions(model: Model) -> Contradictions:
    """What is wrong with the files beside model.yaml that a variant needs, cheaply: without opening weights."""
    for name in sorted({artefact for variant in model.variants.values() for artefact in variant.artefacts.values()}):
        for source in sorted({name, *sources_of(model, name)}):
            artefact = model.artefacts[source]
            if isinstance(artefact, LocalFile):
                yield from _local_contradictions(model, source, artefact)


def _local_contradictions(model: Model, name: str, artefact: LocalFile) -> Contradictions:
    path = Path(model.folder, artefact.path)
    if not path.is_file():
        yield f"artefacts.{name}.path", f"a file in {Path(model.folder).name}/", artefact.path
    elif (got := local_sha256(path)) not in (artefact.sha256, None):
        yield f"artefacts.{name}.sha256", f"that of {artefact.path}, {got}", artefact.sha256
