"""The models folder as a process sees it: its catalogue and profiles, read again when files change, and reported.

A change is detected by sizes, times and inodes of the files behind links, so that a mounted folder whose links are
swapped (a Kubernetes ConfigMap) counts as changed. Readers take whole immutable values, which `look` replaces.

Each process calls `broker.valkey.records.watch_call` once a second. It reports what it serves, if that changed, and
learns how often an operator requested a reload (`RELOADS`). A report expires a minute after its process's last call.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from tasks.models.catalogue import Catalogue, Model, load_catalogue
from tasks.models.discovered import with_discovered
from tasks.models.files import Stamp, forget, stamp_of
from tasks.models.profiles import ProfileBook, ProfileError, load_book
from tasks.queues_file import QueuesFile

logger = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two checks of the folder."""

_SHOWN = 12  # hexadecimal digits of a digest


class ModelsFolder:
    """One process's catalogue and profiles. Thread-safe.

    Args:
        root: the folder of the models' folders.
        queues: the process's queues.yaml, which is looked at together with the folder.
        packages: versions in use of the packages that profiles were measured with, if profiles should doubt others.

    `discovered` are models that endpoints serve without a model.yaml, by name, which the next look adds.
    `digests` identifies the description of each model served, by its `name:version`.
    """

    def __init__(self, root: Path, queues: QueuesFile, packages: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.catalogue = self._written = Catalogue({})
        self.discovered: Mapping[str, Model] = {}
        self._added: Mapping[str, Model] = {}
        self.book = ProfileBook()
        self.digests: Mapping[str, str] = {}
        self.queues = queues
        self._packages = packages
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

    def look(self, *, closely: bool = False) -> bool:
        """Read what changed since the last check; returns whether anything differs now.

        Args:
            closely: read everything again, whatever the files' times.
        """
        with self._turn:
            renewed = self.queues.look(closely=closely)
            if not self.root.is_dir() and self._stamps:
                return renewed  # a mount that is missing for a moment does not remove its models
            if closely:
                forget()
            stamps = self._stamp(self._written)
            if stamps == self._stamps and self.discovered == self._added and not closely:
                return renewed
            before, known = self.catalogue, self.book
            self._stamps = stamps
            self._read()
            _log(before, self.catalogue)
            changed = not _alike(before, self.catalogue) or known != self.book
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
        self._written, self._added = load_catalogue(self.root, self._written), self.discovered
        self.catalogue = with_discovered(self._written, self._added)
        today = datetime.datetime.now(datetime.UTC).date()
        self.book, self._broken_profiles = load_book(self.root, today, self._packages)
        self.digests = {name: _model_digest(model) for name, model in self.catalogue.models.items()}
        self._stamps = {**self._stamp(self._written), **self._stamps}

    def _log_profiles(self) -> None:
        """Log the profiles that cannot be read: their devices get a warning, and the process starts."""
        for error in self._broken_profiles:
            logger.warning("a profile cannot be read", extra={"error": str(error)})


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, list[str]]:
    """What was `added`, `replaced` and `removed` between two `digests`."""
    return {
        "added": sorted(after.keys() - before.keys()),
        "replaced": sorted(name for name in after.keys() & before.keys() if after[name] != before[name]),
        "removed": sorted(before.keys() - after.keys()),
    }


def _alike(one: Catalogue, other: Catalogue) -> bool:
    """Whether two catalogues serve the same models, with the same problems of others."""
    return (one.models, one.disabled, one.outdated) == (other.models, other.disabled, other.outdated)


def _log(before: Catalogue, after: Catalogue) -> None:
    for name, reason in after.disabled.items():
        if before.disabled.get(name) != reason:
            logger.error("model disabled", extra={"model": name, "reason": reason})
    for name, reason in after.outdated.items():
        if before.outdated.get(name) != reason:
            logger.error("model served as it was: its file is wrong", extra={"model": name, "reason": reason})
    if before.models:
        differ = changes(*({n: str(id(m)) for n, m in one.models.items()} for one in (before, after)))
        if any(differ.values()):
            logger.info("models changed", extra=differ)


def _model_digest(model: Model) -> str:
    return hashlib.sha256(msgspec.json.encode(model, enc_hook=int)).hexdigest()[:_SHOWN]


LIVE = 5
"""Seconds since its last call within which a process counts as running."""


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a process serves from its models folder.

    `reload` is the last requested reload that it has done. `models` maps `name:version` to a digest of its description.
    `queues_changed` means that its queues.yaml says more by now than it uses without a restart. `plan` is the number of
    the plan that a router follows, 0 without one.
    """

    kind: Literal["router", "worker"]
    reload: int
    models: Mapping[str, str]
    disabled: Mapping[str, str] = {}
    outdated: Mapping[str, str] = {}
    queues_changed: bool = False
    plan: int = 0


class Reporter:
    """Makes one process's arguments for `watch_call`, and follows its answers. For one thread at a time.

    `plan` is reported as it was last set.
    """

    def __init__(self, folder: ModelsFolder, kind: Literal["router", "worker"], process: str) -> None:
        self._folder = folder
        self._kind = kind
        self._process = process
        self._asked: int | None = None
        self._done = 0
        self._told = b""
        self._sent = b""
        self.plan = 0

    @property
    def asked(self) -> bool:
        """Whether a reload was requested that this process has not done."""
        return self._asked is not None and self._asked > self._done

    def looked(self) -> None:
        """Record that all reloads requested so far are done."""
        self._done = self._asked or 0

    def arguments(self) -> Sequence[str | bytes]:
        """The process's name and its report; empty if the store already has it."""
        folder = self._folder
        self._sent = msgspec.json.encode(
            Report(
                kind=self._kind,
                reload=self._done,
                models=folder.digests,
                disabled=folder.catalogue.disabled,
                outdated=folder.catalogue.outdated,
                queues_changed=folder.queues.differs,
                plan=self.plan,
            )
        )
        return self._process, b"" if self._sent == self._told else self._sent

    def heard(self, answer: Sequence[int]) -> None:
        """Process the answer."""
        asked, known = int(answer[0]), bool(answer[1])
        if self._asked is None or asked < self._asked:  # requests from before the start are done; or it is a new store
            self._done = asked
        self._asked = asked
        self._told = self._sent if known else b""
