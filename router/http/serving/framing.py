"""Where a request ends in what a connection sends, so that uvicorn's parser is given one request at a time. Pure.

The parser decides what is HTTP, but it takes all that it is given at once: a read of 64 KiB can hold 3,500 requests of
some 5 kB each once they are parsed. Only what decides about ends is read here, and what could be read in two ways is
refused (RFC 9112, sections 6.3 and 11.2).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_NO_REQUEST = (b"connect ", b"pri ")  # asks for a tunnel; begins HTTP/2, of which the parser waits for more
_CONTENT_LENGTH, _TRANSFER_ENCODING = b"\r\ncontent-length:", b"\r\ntransfer-encoding:"
_DIGITS = 18  # of a length: fewer than the parser's own numbers have
_SIZE = re.compile(rb"([0-9a-f]{1,15})(?![0-9a-f])", re.IGNORECASE)
_ENOUGH = 24  # bytes of a line that came in pieces: more than any size has


class FramingError(Exception):
    """The end of a request cannot be told."""


class Framing(NamedTuple):
    """A head as it is passed on, and the body behind it: of `length` bytes, or chunked."""

    head: bytes
    length: int
    chunked: bool


def framing_of(head: bytes) -> Framing:
    """What follows a head, which ends with its empty line. A wish to speak another protocol is taken out of it.

    Raises:
        FramingError: it is no head, has several lengths, or a length and an encoding; or it asks for a tunnel.
    """
    lowered = head.lower()
    if not lowered[:1].isalpha() or lowered.startswith(_NO_REQUEST):
        raise FramingError
    if b"\r\nupgrade:" in lowered:
        head = _UPGRADE.sub(b"", head)
    lengths, encodings = lowered.count(_CONTENT_LENGTH), lowered.count(_TRANSFER_ENCODING)
    if lengths + encodings > 1:
        raise FramingError
    if lengths:
        return Framing(head, _length_in(_value(lowered, _CONTENT_LENGTH)), chunked=False)
    if encodings and _value(lowered, _TRANSFER_ENCODING) != b"chunked":
        raise FramingError
    return Framing(head, 0, chunked=bool(encodings))


def _value(head: bytes, header: bytes) -> bytes:
    """What a header says that stands in a head once."""
    begin = head.find(header) + len(header)
    return head[begin : head.find(b"\r\n", begin)].strip(b" \t")


def _length_in(value: bytes) -> int:
    if not value.isdigit() or len(value) > _DIGITS:
        raise FramingError
    return int(value)


class Chunks:
    """Finds the end of a chunked body (RFC 9112, section 7.1), which comes in pieces."""

    def __init__(self) -> None:
        self.ended = False
        self.trailing = 0
        """Bytes behind the last chunk."""
        self._line = b""  # the beginning of one that is not whole yet
        self._left = 0  # bytes of the chunk that comes, with the line break behind it
        self._last = False

    def end_in(self, piece: bytes) -> int:
        """How much of `piece` belongs to the body; `ended` says whether it is whole.

        Raises:
            FramingError: a chunk's size is none.
        """
        at = 0
        while at < len(piece) and not self.ended:
            if self._left:
                step = min(self._left, len(piece) - at)
                self._left, at = self._left - step, at + step
                continue
            end = piece.find(b"\n", at)
            stop = len(piece) if end < 0 else end
            line = self._line + piece[at : min(stop, at + _ENOUGH)]
            self.trailing += stop - at if self._last else 0
            at = stop if end < 0 else stop + 1
            self._line = line[:_ENOUGH] if end < 0 else b""
            if end >= 0:
                self._read(line)
        return at

    def _read(self, line: bytes) -> None:
        """Take a whole line: a chunk's size, a trailer, or the empty one behind them."""
        if self._last:
            self.ended = not line.strip(b"\r")
            return
        size = _SIZE.match(line)
        if size is None:
            raise FramingError
        self._left = int(size[1], 16) + 2
        self._last = self._left == 2
        if self._last:
            self._left = 0
