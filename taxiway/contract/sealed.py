"""Sealed payloads: what stands in the place of inputs, outputs and errors that only the holders of a key can read.

No cryptography here; `taxiway.sealing` has it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from taxiway.contract.job import Result, read_answer, read_meta
from taxiway.errors import UNREADABLE, SealedError, TaxiwayError, invalid, unreadable

if TYPE_CHECKING:
    from taxiway.sealing import SealKeys

_MARK = "__sealed__"
_ATTEMPT = re.compile(r"#\d+")

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class ContentFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is said of a request's inputs to who places it. Of sealed inputs it is all that is said."""

    rows: Annotated[int, msgspec.Meta(ge=1, lt=2**31)] = 1
    size: _Count = 0
    """Of a row, in the model's unit, without its answer."""
    longest: _Count = 0
    """The longest answer that is allowed, in the same unit; 0 where none is generated."""
    most_read: _Count | None = None
    """Most tokens of a row's prompt; None where its bytes are the only bound."""
    asks: tuple[str, ...] = ()
    """What a chat asks for that not every variant honours."""


class Sealed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A sealed value, and what it was sealed for."""

    keys: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=16)]
    """Names of the keys, the innermost first: one of each sealed label."""
    job: str
    """The job, or its row at another fleet (`row_of`)."""
    model: str
    """Its name, without a version."""
    content: str
    """Base64."""
    facts: ContentFacts = ContentFacts()
    """Of inputs alone."""
    locality: str | None = None
    """What the model and the classifier said of inputs where they were sealed; not told to other fleets."""

    @property
    def value(self) -> dict[str, Any]:
        """What stands in the place of the sealed value."""
        return {_MARK: msgspec.to_builtins(self)}

    @property
    def text(self) -> str:
        """What stands in the place of an error's text."""
        return msgspec.json.encode(self).decode()


def sealed_in(value: Any) -> Sealed | None:
    """The sealed value in the place of inputs or outputs; None if these are plain.

    Raises:
        InvalidRequestError: it is malformed.
    """
    if not isinstance(value, dict) or _MARK not in value:
        return None
    try:
        return msgspec.convert(value[_MARK], Sealed)
    except msgspec.ValidationError as error:
        raise unreadable(error, _MARK) from error


def sealed_error(error: TaxiwayError) -> Sealed | None:
    """What an error's text was sealed as; None if it is plain.

    Raises:
        InvalidRequestError: it is malformed.
    """
    text = error.details.get("sealed")
    try:
        return None if not isinstance(text, str) else msgspec.json.decode(text, type=Sealed)
    except UNREADABLE as flaw:
        raise invalid("details.sealed", "a sealed text", str(flaw)) from flaw


def read_opened(raw: bytes, seal_keys: SealKeys | None = None) -> Result:
    """The answer in a stored result's bytes, opened; raises as `job.read_answer` does.

    An error that is sealed for others keeps its class alone.

    Raises:
        SealedError: it was altered, or is sealed with a key that is not in `seal_keys`.
    """
    try:
        result = read_answer(raw)
    except TaxiwayError as error:
        sealed = sealed_error(error)
        if sealed is None or seal_keys is None or not set(sealed.keys) <= set(seal_keys.names):
            raise
        raise seal_keys.open_error(error, read_meta(raw).task_id) from None
    sealed = sealed_in(result.outputs)
    if sealed is None:
        return result
    if seal_keys is None:
        keys = ", ".join(sealed.keys)
        hint = "read it at the HTTP API of its fleet, where a router has the key (TAXIWAY_SEAL_KEYS)"
        raise SealedError(f"the result is sealed (key {keys}): {hint}", keys=sealed.keys)
    outputs = seal_keys.open_outputs(result.outputs, read_meta(raw).task_id)
    return msgspec.structs.replace(result, outputs=outputs)


def row_of(key: str) -> str:
    """What a row that goes to another fleet under a key is sealed for: the key without the job's attempt."""
    return _ATTEMPT.sub("#", key, count=1)
