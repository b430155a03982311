"""The files beside a model.yaml, and the code that it names: recipes, networks, Python callables, and runtimes.

A file is hashed again only if it changed.

A name of code is looked up in this order:

1. `<name>.py` beside model.yaml, except for runtimes;
2. `workers/<kind>/<name>.py`, for what several models share;
3. of runtimes alone, an entry point of that name in the group `taxiway.runtimes` of an installed package.

A hyphen in a name is an underscore in the module's. Looking up imports nothing; `Code.load` imports the module.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tasks.settings import TREE

HASHED = 256 * 2**20
"""Bytes of the largest file that is hashed when a catalogue is read: about a second. Workers hash what they open."""

Stamp = tuple[int, int, int]
"""What changes with a file's content: its size in bytes, its modification time in nanoseconds, and its inode."""


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of the file at `path`, through links; None if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises `OSError`."""
    return _sha256(path, stamp_of(path))


@lru_cache(maxsize=1024)
def _sha256(path: Path, _stamp: Stamp | None) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_sha256(path: Path) -> str | None:
    """The same; None if the file is too large to hash here, or cannot be read."""
    try:
        return file_sha256(path) if path.stat().st_size <= HASHED else None
    except OSError:
        return None


Kind = Literal["recipes", "architectures", "callables", "runtimes"]

ENTRIES: Mapping[str, tuple[Kind, str, str]] = {
    "torch": ("architectures", "{}_torch", "build"),
    "jax": ("architectures", "{}_jax", "apply"),
    "python": ("callables", "{}", "call"),
}
"""What a variant's `entry` names, by runtime: the kind, the name and the function. Other runtimes load no code."""


class CodeError(ImportError):
    """There is no code of that name, or it lacks its function: lists what exists, and how to add it."""


@dataclass(frozen=True, slots=True)
class Code:
    """A function that was found by name.

    `reference` is `<module>:<function>`, or `<path>.py:<function>` for a file.
    """

    reference: str

    @property
    def module(self) -> str:
        """The module's name, without a model's folder or `workers.recipes`."""
        module = self.reference.rpartition(":")[0]
        return Path(module).stem if module.endswith(".py") else module.removeprefix("workers.recipes.")

    @property
    def source(self) -> Path:
        """The file that holds it."""
        module = self.reference.rpartition(":")[0]
        return Path(module) if module.endswith(".py") else TREE / f"{module.replace('.', '/')}.py"

    def load(self) -> Callable[..., Any]:
        """The function itself, after importing its module; a file beside model.yaml is imported again each time.

        Raises:
            CodeError: the module has no such function.
        """
        module, _, function = self.reference.rpartition(":")
        imported = _import_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        try:
            found: Callable[..., Any] = getattr(imported, function)
        except AttributeError as error:
            raise CodeError(f"{module}: expected the function {function!r} in it") from error
        return found


def recipe_code(recipe: str, folder: str) -> Code:
    """The function `make(inputs, output, options)` of a recipe, for a model in that folder; empty for none.

    Raises:
        CodeError: there is no such recipe.
    """
    return _find("recipes", recipe, "make", folder)


def entry_code(runtime: str, entry: str, folder: str) -> Code:
    """What the `entry` of a variant names, for a runtime of `ENTRIES`.

    That is `build(weights)` of a torch network, `apply(weights, inputs)` of a JAX one, `call(**inputs)` of a callable.

    Raises:
        CodeError: nothing has that name.
    """
    kind, name, function = ENTRIES[runtime]
    return _find(kind, name.format(entry), function, folder)


def runtime_code(runtime: str) -> Code:
    """The function `open_variant(placed)` of a runtime.

    Raises:
        CodeError: there is no such runtime.
    """
    return _find("runtimes", runtime, "open_variant", "")


def registered(kind: Literal["runtimes", "classifiers"]) -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of installed packages, by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=f"taxiway.{kind}")}


def _find(kind: Kind, name: str, function: str, folder: str) -> Code:
    module = name.replace("-", "_")
    if not module.isidentifier():
        raise CodeError(f"expected a name of letters, digits, - and _ for one of the {kind}, got {name!r}")
    beside = Path(folder, f"{module}.py")
    if folder and beside.is_file():
        return Code(f"{beside.absolute()}:{function}")
    if (TREE / "workers" / kind / f"{module}.py").is_file():
        return Code(f"workers.{kind}.{module}:{function}")
    points = registered("runtimes") if kind == "runtimes" else {}
    point = next((found for called, found in points.items() if called.replace("-", "_") == module), None)
    if point is not None:
        return Code(f"{point.module}:{point.attr or function}")
    known = ", ".join(sorted({*_names(kind, function, folder), *points})) or "none"
    add = f"put {module}.py with the function {function} beside model.yaml"
    if kind == "runtimes":
        add = f'install a package with the entry point {name} in the group "taxiway.runtimes"'
    raise CodeError(f"no {kind.removesuffix('s')} {name!r}: expected one of {known}; to add it, {add}")


def _names(kind: Kind, function: str, folder: str) -> Iterator[str]:
    """The names available to a model in that folder: ours, and its own."""
    for place in [TREE / "workers" / kind, *([Path(folder)] if folder else [])]:
        for file in place.glob("*.py"):
            if f"\ndef {function}(" in file.read_text(encoding="utf-8"):
                yield file.stem.replace("_", "-") if kind == "recipes" else file.stem


def _import_file(file: Path) -> ModuleType:
    name = f"models.{file.parent.name}.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module
