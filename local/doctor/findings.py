"""One line of what the doctor reports."""

from __future__ import annotations

import msgspec


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a fleet can use: what was found or, if it is missing, how to get it."""

    subject: str
    found: bool
    value: str
    remedy: str = ""
