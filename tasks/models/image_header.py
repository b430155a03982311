"""How many pixels a JPEG or PNG has, read from a few bytes of its header; nothing is decoded. Pure.

Sources: ITU-T T.81, annex B (JPEG markers); W3C PNG, 11.2.1 (IHDR).
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable

Read = Callable[[int, int], bytes]
"""Gives so many bytes from a place on; fewer where the picture ends."""

SEGMENTS = 64
"""Segments of a JPEG that are passed over in search of its size; cameras write about twenty before it."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a frame header
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length after them


def pixels_of(read: Read) -> int | None:
    """Width times height; None where there is no such header."""
    head = read(0, 24)
    if head.startswith(_PNG) and head[12:16] == b"IHDR" and len(head) == 24:
        width, height = struct.unpack(">II", head[16:24])
        return int(width) * int(height) or None
    return _jpeg_pixels(read) if head.startswith(_JPEG) else None


def read_bytes(content: bytes | bytearray | memoryview) -> Read:
    """Reads from bytes."""
    return lambda start, length: bytes(content[start : start + length])


def read_base64(text: str) -> Read:
    """Reads from base64 text, of which it decodes no more than is asked for; nothing where that is malformed."""

    def read(start: int, length: int) -> bytes:
        first, last = start // 3, -(-(start + length) // 3)
        try:
            window = base64.b64decode(text[4 * first : 4 * last])
        except ValueError:
            return b""
        return window[start - 3 * first :][:length]

    return read


def _jpeg_pixels(read: Read) -> int | None:
    at = len(_JPEG)
    for _ in range(SEGMENTS):
        segment = read(at, 9)
        if len(segment) < 9 or segment[0] != 0xFF:
            return None
        marker = segment[1]
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", segment[5:9])
            return int(width) * int(height) or None
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _ALONE:
            at += 2
        else:
            at += 2 + max(int.from_bytes(segment[2:4], "big"), 2)
    return None
