"""The recorded basis of a placement, from which `api.routing.explanation` recomputes its table. Pure.

Snapshots are stored under the name that records refer to.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np

from router.decide.classify import Needs, level_of
from router.decide.snapshot import FleetSnapshot
from tasks.history import PRIORITIES, PlacedTerms, UnservedTerms


class Basis(msgspec.Struct, frozen=True, array_like=True):
    """What one placement was decided from, besides its model and job id.

    `snapshot` names the stored `FleetSnapshot`. `work` maps each class to the device seconds ahead at the time of the
    decision, one figure per level, including placements made since the snapshot; classes without any are left out.
    """

    snapshot: str
    needs: Needs
    work: dict[str, tuple[float, ...]]


_encode = msgspec.json.Encoder().encode
_decode_basis = msgspec.json.Decoder(Basis).decode


def basis_text(needs: Needs, snapshot: str, classes: Sequence[str], ahead: np.ndarray) -> str:
    """A placement's basis for its job's record. `ahead` is the work it was decided from, without the job's own."""
    work = {classes[row]: tuple(ahead[row].tolist()) for row in np.flatnonzero(ahead.any(axis=1)).tolist()}
    return _encode(Basis(snapshot, needs, work)).decode()


def read_basis(text: str) -> Basis | None:
    """The basis in a job's record; None if it is absent or written by an incompatible release."""
    try:
        return _decode_basis(text) if text else None
    except msgspec.MsgspecError:
        return None


def pack_snapshot(fleet: FleetSnapshot) -> bytes:
    """A snapshot as stored: JSON, deflated because devices are much alike."""
    return zlib.compress(_encode(fleet), 1)


@lru_cache(maxsize=4096)
def terms_of(basis: str) -> PlacedTerms:
    """The terms in a record's basis; `PlacedTerms()` if it has none, or another release wrote it."""
    read = read_basis(basis)
    return PlacedTerms() if read is None else _terms(read.needs)


def _terms(needs: Needs) -> PlacedTerms:
    place = needs.constraints
    alike = [n for n, name in enumerate(PRIORITIES) if level_of(needs.deadline, name) == needs.level]
    priority = PRIORITIES.index("normal") if PRIORITIES.index("normal") in alike else next(iter(alike), -1)
    size = max(round(needs.size) - needs.output, 0)
    return PlacedTerms(place.service, place.locality or "", needs.rows, size, needs.output, priority)


def unserved_terms(model: str, tenant: str, needs: Needs) -> UnservedTerms:
    """The terms of a refused request."""
    return UnservedTerms(model, tenant, _terms(needs), needs.deadline)
