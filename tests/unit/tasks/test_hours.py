import math
from datetime import datetime
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.queues.hours import Hours, closes_in, flaw, opens_in, serves_in

BERLIN = "Europe/Berlin"
NIGHT = Hours(hours="22:00-07:00", zone=BERLIN)


def at(text: str, zone: str = BERLIN) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("now", "opens", "closes"),
    [
        ("2026-11-30 21:00", 3600, 0),
        ("2026-11-30 22:00", 0, 9 * 3600),
        ("2026-12-01 06:59", 0, 60),
        ("2026-12-01 07:00", 15 * 3600, 0),
        ("2026-10-25 00:00", 0, 8 * 3600),  # the clock is set back in this night
        ("2026-03-29 00:00", 0, 6 * 3600),
    ],
)
def test_a_class_serves_within_its_hours(now: str, opens: float, closes: float) -> None:
    assert (opens_in(NIGHT, at(now)), closes_in(NIGHT, at(now))) == (opens, closes)
    assert (opens_in(None, at(now)), closes_in(None, at(now))) == (0.0, math.inf), "without hours it always does"


CLOCKS = st.times().map(lambda one: f"{one:%H:%M}")


@given(CLOCKS, CLOCKS, st.sampled_from([BERLIN, "UTC", "Asia/Kathmandu"]), st.floats(1.6e9, 2e9))
def test_a_class_is_open_or_opens_within_a_day(begin: str, end: str, zone: str, now: float) -> None:
    available = Hours(hours=f"{begin}-{end}", zone=zone)
    if flaw(available) is not None:
        assert begin == end
        return
    opens, closes = opens_in(available, now), closes_in(available, now)
    assert (opens == 0) != (closes == 0)
    assert 0 < opens + closes <= 25 * 3600
    if opens:
        assert closes_in(available, now + opens) > 0


def test_a_worker_that_would_have_to_leave_at_once_waits_for_the_next_hours() -> None:
    assert serves_in(NIGHT, at("2026-11-30 23:00"), 60) == 0
    assert serves_in(NIGHT, at("2026-12-01 06:59"), 60) == 60 + 15 * 3600
    assert serves_in(NIGHT, at("2026-11-30 21:00"), 60) == 3600
    assert serves_in(None, 0.0, 60) == 0


def test_hours_that_cannot_be_are_named() -> None:
    assert flaw(Hours(hours="07:00-07:00")) == ("hours", "two different times", "07:00-07:00")
    zone = "a time zone that this machine knows, such as Europe/Berlin"
    assert flaw(Hours(hours="07:00-08:00", zone="Mars/Olympus")) == ("zone", zone, "Mars/Olympus")
    with pytest.raises(msgspec.ValidationError, match="Expected `str` matching regex"):
        msgspec.convert({"hours": "24:00-07:00"}, Hours)
