"""What `taxiway doctor` finds: this machine, its configuration, its endpoints and the fleet that runs here."""

from __future__ import annotations

import msgspec


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a fleet can use: what was found or, if it is missing, how to get it."""

    subject: str
    found: bool
    value: str
    remedy: str = ""


def finding(subject: str, value: str, *, found: bool = True, remedy: str = "") -> Finding:
    """What there is of a subject, or the remedy if it is missing or wrong."""
    return Finding(subject=subject, found=found, value=value, remedy="" if found else remedy)


def problem(subject: str, text: str, remedy: str) -> Finding:
    """Something that is missing or wrong."""
    return finding(subject, text, found=False, remedy=remedy)
