"""Where each request ends in a connection's byte stream, so that uvicorn's parser gets one request at a time. Pure.

The parser decides what is valid HTTP, but it consumes everything that it is given: a read of 64 KiB can hold 3,500
requests of some 5 kB each once parsed. Only what determines the end of a request is read here, and ambiguous framing is
refused (RFC 9112, sections 6.3 and 11.2).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_NO_REQUEST = (b"connect ", b"pri ")  # a tunnel request; the HTTP/2 preface, for which the parser would wait
_CONTENT_LENGTH, _TRANSFER_ENCODING = b"\r\ncontent-length:", b"\r\ntransfer-encoding:"
_DIGITS = 18  # most digits of a length: within the range of the parser's integers
_SIZE = re.compile(rb"([0-9a-f]{1,15})(?![0-9a-f])", re.IGNORECASE)
_ENOUGH = 24  # bytes kept of a partial line: more than any chunk size has


class FramingError(Exception):
    """The end of a request cannot be determined."""


class Framing(NamedTuple):
    """A head to pass on, and the body after it: of `length` bytes, or chunked."""

    head: bytes
    length: int
    chunked: bool


def framing_of(head: bytes) -> Framing:
    """The framing of a head, which ends with its empty line. A request to upgrade the protocol is removed from it.

    Raises:
        FramingError: not a head, several lengths, both a length and an encoding, or a tunnel request.
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
    """The value of a header that occurs once in a head."""
    begin = head.find(header) + len(header)
    return head[begin : head.find(b"\r\n", begin)].strip(b" \t")


def _length_in(value: bytes) -> int:
    if not value.isdigit() or len(value) > _DIGITS:
        raise FramingError
    return int(value)


class Chunks:
    """Finds the end of a chunked body (RFC 9112, section 7.1) that arrives in pieces."""

    def __init__(self) -> None:
        self.ended = False
        self.trailing = 0
        """Bytes after the last chunk."""
        self._line = b""  # start of an incomplete line
        self._left = 0  # bytes left of the present chunk, with the line break after it
        self._last = False

    def end_in(self, piece: bytes) -> int:
        """The number of bytes of `piece` that belong to the body; `ended` is set once it is complete.

        Raises:
            FramingError: invalid chunk size.
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
        """Process a complete line: a chunk's size, a trailer, or the empty line after them."""
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
