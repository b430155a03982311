"""Which checkpoint a run goes on from: a sound one of its own row, callable and kind of device, and no other."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.decide.checkpoints import Checkpoint, Resuming, checksum, damaged, left, read_checkpoint, unusable

ROW = Resuming("j", 0, "digest", "cpu", most=100)
CONTENT = b"a state"
CHECKPOINT = Checkpoint(
    key="k",
    job="j",
    row=0,
    form="bytes",
    size=len(CONTENT),
    checksum=checksum(CONTENT),
    digest="digest",
    kind="",
    useful=12.5,
    fraction=0.5,
)


def changed(**fields: Any) -> Checkpoint:
    return msgspec.structs.replace(CHECKPOINT, **fields)


@pytest.mark.cases("fields, why")
def test_a_checkpoint_is_refused_by_name(fields: dict[str, Any], why: str) -> None:
    found = unusable(changed(**fields), ROW)
    assert why in found and bool(found) == bool(why)


@given(st.binary())
@example(CONTENT[::-1])
def test_no_other_bytes_pass_for_a_checkpoint_s(content: bytes) -> None:
    assert damaged(CHECKPOINT, CONTENT) == ""
    assert bool(damaged(CHECKPOINT, content)) == (content != CONTENT)
    assert damaged(CHECKPOINT, None) == "it has expired"


def test_what_another_release_wrote_is_refused_and_what_is_before_it_is_read() -> None:
    refused, read = map(read_checkpoint, [b'{"key":"k"}', msgspec.json.encode(CHECKPOINT)])
    assert refused == "another release wrote it"
    assert read == CHECKPOINT


FRACTIONS = st.just(0.0) | st.floats(1e-9, 1)


@given(FRACTIONS, FRACTIONS, st.floats(0, 1e6))
def test_the_time_left_is_of_what_is_left_at_the_rate_so_far(fraction: float, first: float, since: float) -> None:
    seconds = left(fraction, since, first)
    assert (seconds is None) == (fraction <= first)
    if seconds is not None:
        assert seconds * (fraction - first) == pytest.approx(since * (1 - fraction))
