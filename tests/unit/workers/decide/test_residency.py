"""Which variants leave a device: what stays is worth more a byte, and what is in use stays."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.decide.residency import FADE, InUseError, NoRoomError, Resident, Uses, evict

NOW = 1000.0
uses = st.builds(Uses, rate=st.floats(0, 100), last=st.floats(0, NOW))
residents = st.lists(
    st.builds(
        Resident,
        variant=st.uuids().map(str),
        memory=st.integers(0, 100),
        uses=uses,
        load=st.floats(0, 100),
        in_use=st.booleans(),
    ),
    unique_by=lambda resident: resident.variant,
    max_size=10,
)


def leaving(loaded: list[Resident], need: int, budget: int) -> list[Resident]:
    try:
        names = evict(loaded, need, budget, NOW)
    except InUseError:
        return []
    return [next(resident for resident in loaded if resident.variant == name) for name in names]


@given(loaded=residents, need=st.integers(0, 100), budget=st.integers(100, 300))
def test_what_stays_fits_and_what_is_in_use_stays(loaded: list[Resident], need: int, budget: int) -> None:
    try:
        names = evict(loaded, need, budget, NOW)
    except InUseError:
        assert sum(resident.memory for resident in loaded if resident.in_use) + need > budget
        return
    stays = [resident for resident in loaded if resident.variant not in names]
    assert sum(resident.memory for resident in stays) + need <= budget
    assert all(resident in stays for resident in loaded if resident.in_use)


@given(loaded=residents, need=st.integers(0, 100))
def test_no_variant_leaves_before_one_that_is_worth_less(loaded: list[Resident], need: int) -> None:
    gone = leaving(loaded, need, 100)
    stayed = [resident for resident in loaded if resident not in gone and not resident.in_use]
    values = [resident.value(NOW) for resident in gone]
    assert all(before <= after for before, after in pairwise(values))
    assert not gone or all(values[-1] <= resident.value(NOW) for resident in stayed)


def test_nothing_leaves_where_there_is_room_and_a_variant_larger_than_the_device_is_refused() -> None:
    assert evict([Resident("a", 40, Uses(1.0, NOW), 1.0)], 50, 100, NOW) == []
    with pytest.raises(NoRoomError, match="needs 200 bytes, the device has 100"):
        evict([], 200, 100, NOW)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (Resident("other", 50, Uses(0.1, NOW), 4.0), "it is used seldom"),
        (Resident("other", 50, Uses(1.0, NOW), 0.1), "it is soon loaded again"),
        (Resident("other", 90, Uses(1.0, NOW), 4.0), "it frees more"),
        (Resident("other", 50, Uses(1.0, NOW - 9 * FADE), 4.0), "its uses are long ago"),
    ],
)
def test_a_variant_leaves_because(other: Resident, why: str) -> None:
    kept = Resident("kept", 50, Uses(1.0, NOW - 1), 4.0)
    assert evict([kept, other], 50, 140, NOW) == ["other"], why


def test_uses_fade_and_add_up() -> None:
    once = Uses().once_more(NOW)
    assert once.at(NOW) == pytest.approx(1 / FADE)
    assert once.once_more(NOW).at(NOW) == pytest.approx(2 / FADE)
    assert once.at(NOW + FADE) == pytest.approx(once.at(NOW) / 2.718281828)
