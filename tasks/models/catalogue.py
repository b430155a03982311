"""The model catalogue: every model of the fleet by its names, immutable.

The file `model.yaml` of a model's folder describes its current version; older versions stand beside it as
`model-<version>.yaml` (`folder` reads them).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from tasks.models.model import Alias, Model, ModelError
from taxiway.errors import ModelUnavailableError, TaxiwayError, UnknownModelError, cut, quoted


@dataclass(eq=False)
class Catalogue:
    """All models, by exact name, alias and bare name (the version aliased `stable`, else the newest). Immutable."""

    models: Mapping[str, Model]
    """What is served, by `name:version`."""
    disabled: Mapping[str, str] = field(default_factory=dict)
    """Why a model is not served, by the requested name: a bare one for `model.yaml`, else `name:version` with the
    version in the file's name."""
    outdated: Mapping[str, str] = field(default_factory=dict)
    """Why a model's file is wrong, for models still served in their last valid form, by `name:version`."""
    files: Set[Path] = frozenset()
    """The files beside a model.yaml that it names, missing ones included: a change to them may repair or break one."""
    others: Mapping[str, Alias] = field(default_factory=dict)
    """Second names of models, by name."""

    def __post_init__(self) -> None:
        """Find the names of each model, and disable the second names that lead nowhere."""
        own = _names(self.models, self.disabled)
        second = {name: alias.names(own) for name, alias in self.others.items()}
        self._names = own | {name: model for added in second.values() for name, model in added.items()}
        nowhere = {name: str(dangling(self.others[name])) for name, added in second.items() if name not in added}
        self.disabled = {**self.disabled, **nowhere}

    def resolve(self, reference: str) -> Model:
        """The model that a reference such as `sentiment`, `sentiment:2` or `sentiment@stable` names.

        Raises:
            ModelUnavailableError: it is disabled; says why.
            UnknownModelError: no model of that name; lists similar names.
        """
        found = self._names.get(reference)
        if found is None:
            raise self._missing(reference)
        return found

    def serves(self, reference: str) -> bool:
        """Whether `resolve` succeeds for the reference."""
        return reference in self._names

    def bare_names(self) -> list[tuple[str, Model]]:
        """The bare and the second names that `resolve` accepts, each with its model, sorted by name."""
        return sorted((name, its) for name, its in self._names.items() if name in self.others or name == its.name)

    def versions(self, name: str) -> list[Model]:
        """The served versions of the model with this bare or second name, oldest first."""
        found = (model for own, model in self._names.items() if own == f"{name}:{model.version}")
        return sorted(found, key=lambda model: model.version)

    def bare(self, reference: str) -> str:
        """The reference without the version or alias in it; a second name may have colons of its own."""
        name = reference.partition("@")[0]
        second = next((one for one in (name, name.rpartition(":")[0]) if one in self.others), "")
        return second or name.partition(":")[0]

    def _missing(self, reference: str) -> TaxiwayError:
        name = self.bare(reference)
        found = (self.disabled.get(one) for one in (reference, name, folder_of(reference)))
        reason = next(filter(None, found), None)
        if reason is not None:
            message = f"model {quoted(reference)} is disabled: {reason}"
            return ModelUnavailableError(message, model=cut(reference), reason=reason)
        similar = difflib.get_close_matches(reference, self._names, n=3)
        hint = f"; did you mean {', '.join(similar)}?" if similar else ""
        return UnknownModelError(f"unknown model {quoted(reference)}{hint}", model=cut(reference), near=similar)


def _names(models: Mapping[str, Model], disabled: Collection[str]) -> dict[str, Model]:
    names: dict[str, Model] = dict(models)
    for model in sorted(models.values(), key=lambda m: (m.name, m.version)):
        bare = names.get(model.name)
        current = "stable" in model.aliases or model.name not in disabled  # no older version silently replaces it
        if current and (bare is None or "stable" not in bare.aliases):
            names[model.name] = model
        names |= {f"{model.name}@{alias}": model for alias in model.aliases}
    return names


def folder_of(name: str) -> str:
    """The folder of the model or second name; a file's name has neither slashes nor, on some systems, colons."""
    return re.sub("[/:]", "--", name)


def dangling(alias: Alias) -> ModelError:
    """The error of an alias that names no model."""
    return ModelError(alias.file, "alias", "a model that is served", alias.target)


def reference_of(model: str, version: str | None) -> str:
    """The reference to a model and, if given, one of its versions by number or alias, from the parts of a URL."""
    if version is None:
        return model
    return f"{model}:{version}" if version.isdecimal() else f"{model}@{version}"
