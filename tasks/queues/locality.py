"""Where a request's data may go: labels that every device on its way must have.

A locality is one label, or several joined by `+` in alphabetical order: `eu+ward`. Labels come from the request, from
its tenant and its model, and from the fleet's classifier. They add up: a source can keep data closer, and none can let
it go further than another one allows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated

import msgspec

from tasks.document import Contradictions
from taxiway.contract.request import MAX_NAME
from taxiway.contract.wire import key_id

JOINT = "+"

LocalityText = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
PublicKey = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def joined(*localities: str | None) -> str | None:
    """The locality with the labels of all of these; None if there are none."""
    return JOINT.join(sorted({label for one in localities for label in labels_of(one)})) or None


def labels_of(locality: str | None) -> list[str]:
    """The labels of a locality."""
    return [label for label in (locality or "").split(JOINT) if label]


def missing(locality: str | None, labels: Collection[str]) -> list[str]:
    """The labels of a locality that are not among a class's `labels`."""
    return [label for label in labels_of(locality) if label not in labels]


class Locality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where requests may go that say nothing of it. Labels of a request, its tenant and its model add up."""

    default: LocalityText | None = None
    """Labels of a request that has none from itself, its tenant, its model or the classifier. Example: ward"""
    required: bool = False
    """Whether a request without any label is refused."""
    classifier: str | None = None
    """An entry point of the group `taxiway.classifiers`: a function of a package installed beside the routers, which
    labels requests by what is in them. Example: patterns"""
    sealed: dict[str, Annotated[tuple[PublicKey, ...], msgspec.Meta(min_length=1)]] = {}
    """Labels whose requests and results only holders of a private key can read, each with its public keys (X25519, 64
    hexadecimal digits): the first seals, the others sealed before. `taxiway check` prints those of the private keys
    in TAXIWAY_SEAL_KEYS. Example: {ward: [8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a]}"""

    def sealing(self, locality: str | None) -> dict[str, bytes]:
        """The public key that seals for each sealed label of a locality, in the order of the labels."""
        return {label: bytes.fromhex(self.sealed[label][0]) for label in labels_of(locality) if label in self.sealed}

    @property
    def key_names(self) -> tuple[str, ...]:
        """Names of the keys of all sealed labels."""
        return tuple(key_id(bytes.fromhex(key)) for keys in self.sealed.values() for key in keys)

    def labels_of_keys(self, names: Collection[str]) -> list[str]:
        """The label of each key with one of these names; empty for a key that no label has."""
        labels = (label for label, keys in self.sealed.items() for _ in keys)
        known = dict(zip(self.key_names, labels, strict=True))
        return [known.get(name, "") for name in names]


def sealing_contradictions(locality: Locality, labels: Sequence[str]) -> Contradictions:
    """Sealed labels that are not among those of classes, and keys that are given twice: a key stands for its label."""
    keys = [key for keys in locality.sealed.values() for key in keys]
    for label, given in locality.sealed.items():
        if label not in labels:
            yield f"locality.sealed.{label}", f"a label that a class has ({', '.join(labels) or 'none has any'})", label
        for place, key in enumerate(given):
            if keys.count(key) > 1:
                yield f"locality.sealed.{label}.{place}", "a key that is given once", key
