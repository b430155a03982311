"""A generation that is cut and goes on: what its record and stream keep of the answer, and its parts. Pure.

A *part* is one run on one endpoint. The *seam* between two parts is where the first was cut: the next one reads prompt
and text, and goes on after it, or begins again if the endpoint cannot.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from taxiway.contract.job import GenerationPart, Tokens
from taxiway.contract.stream import Piece


class CutGeneration(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is kept of an answer."""

    attempt: int = 0
    """The number of the claim that wrote it."""
    text: str = ""
    tokens: int = 0
    """The text's length."""
    seed: int | None = None
    """The request's own."""
    parts: tuple[GenerationPart, ...] = ()
    """The runs so far."""


NOTHING = CutGeneration()
"""What is kept of an answer that begins."""

decode_kept = msgspec.json.Decoder(CutGeneration).decode


def total(parts: Iterable[GenerationPart]) -> Tokens:
    """The tokens that parts used."""
    used = Tokens()
    for part in parts:
        used = used.plus(part.tokens)
    return used


def with_streamed(kept: CutGeneration, pieces: Iterable[Piece]) -> CutGeneration:
    """What is kept, and what readers got of the answer beyond that, by the pieces of its stream in order.

    A worker that is lost may have sent text that it had not kept. Its reader goes on from there, so the next part must.
    A stream that has more than text, or lacks some, adds nothing.
    """
    attempt, text, tokens = kept.attempt, kept.text, kept.tokens
    for piece in pieces:
        if piece.row or piece.beside:
            return kept
        if piece.attempt > attempt:
            attempt, text, tokens = piece.attempt, "", 0
        end = piece.at + len(piece.text)
        if piece.attempt == attempt and piece.at <= len(text) < end and piece.tokens:
            text, tokens = text[: piece.at] + piece.text, piece.tokens
    more = attempt > kept.attempt or len(text) > len(kept.text)
    return msgspec.structs.replace(kept, attempt=attempt, text=text, tokens=tokens) if more and text else kept
