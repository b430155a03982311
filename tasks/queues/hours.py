"""The hours of a day in which a class's machines serve: a lab's computers at night, an office's at the weekend."""

from __future__ import annotations

import math
from datetime import datetime, time, timedelta
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

_BEGIN, _END = 0, 1
_CLOCK = r"([01]\d|2[0-3]):[0-5]\d"


class Hours(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When a class's machines serve, every day."""

    hours: Annotated[str, msgspec.Meta(pattern=f"^{_CLOCK}-{_CLOCK}$")]
    """From when until when, by the clock there; they may end on the next day. Example: 22:00-07:00"""
    zone: str = "UTC"
    """The clock's time zone, by its name in the IANA database. Example: Europe/Berlin"""


def opens_in(available: Hours | None, now: float) -> float:
    """Seconds from `now` (since the epoch) until the machines serve; 0 while they do, and without hours."""
    return _until(available, _BEGIN, now) if available is not None and not closes_in(available, now) else 0.0


def closes_in(available: Hours | None, now: float) -> float:
    """Seconds from `now` (since the epoch) until they serve no longer; 0 while they do not, infinite without hours."""
    if available is None:
        return math.inf
    end = _until(available, _END, now)
    return end if end <= _until(available, _BEGIN, now) else 0.0


def serves_in(available: Hours | None, now: float, least: float) -> float:
    """Seconds from `now` until the machines serve for more than `least` seconds; 0 while they do."""
    left = closes_in(available, now)
    return 0.0 if left > least else left + opens_in(available, now + left)


def flaw(available: Hours) -> tuple[str, str, object] | None:
    """The field that is wrong, what was expected and what came; None if they can be used."""
    begin, _, end = available.hours.partition("-")
    if begin == end:
        return "hours", "two different times", available.hours
    try:
        ZoneInfo(available.zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return "zone", "a time zone that this machine knows, such as Europe/Berlin", available.zone
    return None


def _until(available: Hours, which: int, now: float) -> float:
    """Seconds, above 0, until the clock shows the begin or the end of the hours again."""
    zone, shown = ZoneInfo(available.zone), time.fromisoformat(available.hours.split("-")[which])
    today = datetime.fromtimestamp(now, zone).date()
    moments = [datetime.combine(today + timedelta(days), shown, zone).timestamp() for days in range(3)]
    return next(moment - now for moment in moments if moment > now)
