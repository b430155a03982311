"""Finds the fleet's classifier: a function of an installed package that labels requests by what is in them.

A package registers it under the entry point group `taxiway.classifiers`:

    [project.entry-points."taxiway.classifiers"]
    patterns = "ward_classifier:classify"

`classify(model, inputs, parameters)` gets a model's name, and a request's inputs and parameters as the producer sent
them. It returns a locality (`tasks.queues.locality`), or None. The router calls it for each request: it must be quick,
and must not keep what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tasks.models.files import registered
from tasks.settings import SettingsError
from taxiway.contract.request import Request, is_name
from taxiway.errors import InvalidRequestError

Classifier = Callable[[str, Any, Mapping[str, Any]], str | None]


def load_classifier(name: str | None) -> Classifier | None:
    """The classifier that queues.yaml names; None if it names none.

    Raises:
        SettingsError: no installed package registers it, or it cannot be imported.
    """
    if name is None:
        return None
    found = registered("classifiers")
    if name not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise SettingsError("locality.classifier", f"an entry point of the group taxiway.classifiers ({known})", name)
    try:
        classify: Classifier = found[name].load()
    except Exception as error:
        raise SettingsError("locality.classifier", "a function that can be imported", f"{name}: {error!r}") from error
    return classify


def classified(classify: Classifier, model: str, request: Request) -> str | None:
    """The locality that a classifier finds for a request.

    Raises:
        InvalidRequestError: it fails, or returns something else. The text has nothing of the request in it.
    """
    try:
        locality = classify(model, request.inputs, request.parameters)
    except Exception as error:  # another package's code: nothing of it may end the router, or let the request pass
        raise _unlabelled(f"failed with {type(error).__name__}") from None
    if locality is not None and not is_name(locality):
        raise _unlabelled(f"returned {type(locality).__name__}, expected a label or None")
    return locality


def _unlabelled(why: str) -> InvalidRequestError:
    message = f"locality: where this request may run is not known: the classifier {why}"
    return InvalidRequestError(message, field="locality")
