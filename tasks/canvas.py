"""The tasks that follow from a task in Celery: links, error links, the rest of a chain, a chord's body."""

from __future__ import annotations

from typing import Any

import msgspec

from taxiway.contract.wire import NO_CANVAS
from taxiway.errors import unreadable


class Signature(msgspec.Struct, frozen=True):
    """A task that follows from another one, as Celery encodes it."""

    task: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    options: dict[str, Any] = {}
    subtask_type: str | None = None
    immutable: bool = False


class Embed(msgspec.Struct, frozen=True):
    """The third part of a task's body: the tasks that follow from it."""

    callbacks: list[Signature] | None = None
    errbacks: list[Signature] | None = None
    chain: list[Signature] | None = None
    chord: Signature | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing follows."""
        return not (self.callbacks or self.errbacks or self.chain or self.chord)


_EMPTY = Embed()
_NOTHING = msgspec.json.encode(NO_CANVAS) + b"]"  # how the body of most messages ends
_decode = msgspec.json.Decoder(tuple[msgspec.Raw, msgspec.Raw, Embed | None]).decode


def read_embed(body: bytes) -> Embed:
    """The tasks that follow from the task in a body.

    Raises:
        InvalidRequestError: Celery could not have sent it; names what was expected.
    """
    if body.endswith(_NOTHING):
        return _EMPTY
    try:
        return _decode(body)[2] or _EMPTY
    except msgspec.ValidationError as error:
        raise unreadable(error, "embed", root="[2]") from error
