"""What `taxiway doctor` finds: this machine, its configuration, its endpoints and the fleet that runs here."""

from __future__ import annotations

import msgspec


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a fleet can use: what was found or, if it is missing, how to get it."""

    subject: str
    found: bool
    value: str
    remedy: str = ""


def problem(subject: str, text: str, remedy: str) -> Finding:
    """Something that is missing or wrong."""
    return Finding(subject=subject, found=False, value=text, remedy=remedy)
