"""How errors quote values from requests: shortened, without reading all of a large value."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from itertools import islice
from typing import Any

QUOTED = 200
"""Most characters that an error quotes of one value."""

_DIGITS = 14_000
"""Integers up to this many bits are printed: Python refuses to print more than 4,300 digits."""


class _Short(reprlib.Repr):
    """`reprlib` for types of which it reads the whole value: bytes, mappings (it sorts them), large integers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxstring, self.maxother = 3, 3, 120, 120

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= _DIGITS else f"an integer of {x.bit_length()} bits"

    def repr_bytes(self, x: bytes | bytearray | memoryview, level: int) -> str:
        return repr(bytes(x)) if len(x) <= self.maxother else f"{bytes(x[: self.maxother])!r}…"

    repr_bytearray = repr_memoryview = repr_bytes

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        shown = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in islice(x.items(), self.maxdict)]
        return "{" + ", ".join([*shown, *(["..."] if len(x) > self.maxdict else [])]) + "}"


_short = _Short()


def cut(text: str, most: int = QUOTED) -> str:
    """`text`, truncated to `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def quoted(value: object) -> str:
    """A value's repr in at most `QUOTED` characters."""
    return cut(_short.repr(value))
