"""Which checkpoint a run goes on from, and what is wrong with the others. Pure."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import msgspec

from taxiway.contract.limits import Buffer

_EDGE = 2**12


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a checkpoint, on its job's record."""

    key: str
    """Where its bytes are."""
    job: str
    row: int
    """It is of this row of its job."""
    form: str
    """What the bytes are (`workers.calling.callee`)."""
    size: int
    checksum: int
    digest: str
    """Its callable's."""
    kind: str
    """That of the device it needs; empty for any."""
    useful: float
    """Seconds of the work that it holds."""
    fraction: float
    """The share of its job's work, as the callable reported it."""


@dataclass(frozen=True, slots=True)
class Resuming:
    """A row of a job that may go on from a checkpoint."""

    job: str
    row: int
    digest: str
    """Its callable's."""
    kind: str
    """That of the device."""
    most: int
    """Bytes: limits.checkpoint."""


def unusable(checkpoint: Checkpoint, row: Resuming) -> str:
    """Why the row cannot go on from the checkpoint, by its facts; empty if it can."""
    if checkpoint.job != row.job:
        return f"it is of another job ({checkpoint.job})"
    if checkpoint.digest != row.digest:
        return "it is of another version of the callable"
    if checkpoint.kind not in ("", row.kind):
        return f"it is not portable: it needs a {checkpoint.kind} device, this is a {row.kind} device"
    if checkpoint.size > row.most:
        return over_limit(checkpoint.size, row.most)
    return ""


def damaged(checkpoint: Checkpoint, content: Buffer | None) -> str:
    """What is wrong with a checkpoint's bytes; empty if nothing is."""
    if content is None:
        return "it has expired"
    if len(content) != checkpoint.size:
        return f"it is truncated: {len(content)} of {checkpoint.size} bytes"
    if checksum(content) != checkpoint.checksum:
        return "its bytes are others than were written"
    return ""


def checksum(content: Buffer) -> int:
    """The CRC-32 of the first and last 4 KiB: that of all bytes would take a quarter of the time of writing them."""
    return zlib.crc32(content[-_EDGE:], zlib.crc32(content[:_EDGE]))


def over_limit(size: int, most: int) -> str:
    """What is wrong with a checkpoint of more than `limits.checkpoint` bytes."""
    return f"it has {size} bytes, over limits.checkpoint ({most})"


def left(fraction: float, since: float, first: float) -> float | None:
    """Seconds to the end of a run that took `since` seconds from the fraction `first` to this one; None if unknown."""
    if fraction <= first:
        return None
    return since * (1.0 - fraction) / (fraction - first)


def read_checkpoint(facts: bytes) -> Checkpoint | str:
    """The facts of a checkpoint; why not, where another release wrote them."""
    try:
        return msgspec.json.decode(facts, type=Checkpoint)
    except msgspec.MsgspecError:
        return "another release wrote it"
