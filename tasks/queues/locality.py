"""Where a request's data may go: labels that every device on its way must have.

A locality is one label, or several joined by `+` in alphabetical order: `eu+ward`. Labels come from the request, from
its tenant and its model, and from the fleet's classifier. They add up: a source can keep data closer, and none can let
it go further than another one allows.
"""

from __future__ import annotations

from collections.abc import Collection

JOINT = "+"


def joined(*localities: str | None) -> str | None:
    """The locality with the labels of all of these; None if there are none."""
    return JOINT.join(sorted({label for one in localities for label in labels_of(one)})) or None


def labels_of(locality: str | None) -> list[str]:
    """The labels of a locality."""
    return [label for label in (locality or "").split(JOINT) if label]


def missing(locality: str | None, labels: Collection[str]) -> list[str]:
    """The labels of a locality that are not among a class's `labels`."""
    return [label for label in labels_of(locality) if label not in labels]
