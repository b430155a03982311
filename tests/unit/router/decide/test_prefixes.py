"""Prefixes of prompts: which job had the longest, what that is worth, and how far a request goes for it."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.routing.explanation import explain
from router.decide.candidates import CandidateTable, build_table
from router.decide.classify import Constraints, Needs, Prefix
from router.decide.cost import estimate_figures
from router.decide.prefixes import BLOCK, BLOCKS, Prefixes, prefixes_of, slots_worth
from router.decide.snapshot import FleetSnapshot
from tasks.models.chats import beginning
from tasks.models.model import Profile, Variant
from tasks.models.profiles import ProfileBook
from tests.builders import a_class, a_device, a_topology
from tests.unit.router.decide.test_metered_price import MODEL

CURVE = Profile(base=0.1, step=0.004, slope=0.001, prompt_step=0.0005, prompt_slope=0.0001)
CHAT = msgspec.structs.replace(
    MODEL,
    variants={"engine": Variant(runtime="openai", memory=MODEL.variants["engine"].memory, profiles={"cpu": CURVE})},
)
NEEDS = Needs(deadline=None, level=1, rows=1, size=2200, output=200, longest=500)
"""A prompt of 2,000 tokens."""


def table_of(*classes: str, replicas: int = 2) -> CandidateTable:
    topology = a_topology(**{name: a_class(runtimes=("openai",)) for name in classes})
    devices = [a_device(name, kind="cpu", runtimes=("openai",)) for name in classes for _ in range(replicas)]
    return build_table(CHAT, Constraints(), topology, FleetSnapshot(tuple(devices)), ProfileBook())


@given(st.binary(max_size=5 * BLOCK), st.binary(max_size=3 * BLOCK), st.binary(max_size=3 * BLOCK))
def test_two_prompts_have_as_many_prefixes_in_common_as_whole_blocks(shared: bytes, one: bytes, other: bytes) -> None:
    first, second = prefixes_of("a", shared + b"<" + one), prefixes_of("a", shared + b">" + other)
    common = [mine for mine, theirs in zip(first, second, strict=False) if mine == theirs]
    assert len(common) == len(shared) // BLOCK
    assert first[: len(common)] == tuple(common)
    assert not set(first) & set(prefixes_of("b", shared + b"<" + one))


def test_a_longer_conversation_begins_with_the_shorter_one() -> None:
    turns = [{"role": "user", "content": "why " * 300}, {"role": "assistant", "content": "because " * 300}]
    chat = {"messages": turns, "tools": [{"type": "function", "function": {"name": "look"}}]}
    longer = chat | {"messages": [*turns, {"role": "user", "content": "and " * 500}]}
    most = BLOCK * BLOCKS
    assert beginning(longer, most).startswith(beginning(chat, most))
    assert len(beginning(chat | {"messages": turns * 100}, most)) == most
    assert beginning("once upon", 4) == b"once"
    assert beginning([chat], most) == beginning({"messages": "none"}, most) == b""


@given(st.lists(st.integers(1, 6), max_size=30), st.integers(1, 12))
def test_only_as_many_prefixes_are_kept_and_the_newest_among_them(prompts: list[int], most: int) -> None:
    known = Prefixes(most)
    for number, blocks in enumerate(prompts):
        prefixes = prefixes_of(str(number), bytes(BLOCK * blocks))
        known.note(prefixes, str(number), "engine")
        assert len(known) <= most
        assert known.prompt(prefixes).earlier == str(number)


def test_the_last_job_with_the_longest_known_prefix_is_found() -> None:
    known = Prefixes()
    instructions, chat = bytes(2 * BLOCK), b"question" * BLOCK
    known.note(prefixes_of("a", instructions + chat), "chat", "engine")
    known.note(prefixes_of("a", instructions + b"other" * BLOCK), "other", "engine")
    assert known.prompt(prefixes_of("a", instructions + b"new" * BLOCK)).earlier == "other"
    again = known.prompt(prefixes_of("a", instructions + chat + b"more"))
    assert again.earlier == "chat"
    assert again.prefix == Prefix("engine", 8 * 256)
    assert known.prompt(prefixes_of("b", instructions)).prefix is None


def test_what_was_read_before_makes_a_run_shorter_and_cheaper_where_nothing_is_ahead() -> None:
    table, stated = table_of("engine", "other"), replace(NEEDS, prefix=Prefix("engine", 1024))
    idle, known = estimate_figures(table, NEEDS, np.zeros(2)), estimate_figures(table, stated, np.zeros(2))
    assert known.saved == pytest.approx([1024 * 0.0006, 0.0])
    assert idle.finish - known.finish == pytest.approx(known.saved)
    assert known.cost[0] < idle.cost[0]
    assert (known.cost[1], known.work[0]) == (idle.cost[1], idle.work[0])
    busy = estimate_figures(table, stated, np.full(2, 1e4))
    assert busy.saved.tolist() == [0.0, 0.0]
    told_why = explain(table, stated, np.zeros((2, 4)), seed=0)
    assert told_why.hardware_class == "engine"
    assert "1024 tokens of the prompt were read there before: 0.614 s less" in told_why.reason
    assert [one.saved for one in told_why.considered] == [0.6144, 0.0]


@given(st.integers(0, 4000), st.integers(0, 3000), st.integers(0, 1000), st.floats(0, 1e3))
def test_a_known_prefix_never_makes_anything_slower_or_dearer(read: int, known: int, output: int, ahead: float) -> None:
    table, needs = table_of("engine"), replace(NEEDS, size=read + output, output=output)
    stated = replace(needs, prefix=Prefix("engine", known))
    without, figures = (estimate_figures(table, one, np.array([ahead])) for one in (needs, stated))
    assert 0 <= figures.run[0] <= without.run[0]
    assert 0 <= figures.cost[0] <= without.cost[0]
    assert figures.saved[0] <= read * 0.0006 + 1e-9


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 1000))
def test_a_request_goes_further_for_a_longer_prefix_and_nowhere_for_none(one: int, other: int, output: int) -> None:
    table, needs = table_of("engine"), replace(NEEDS, size=4001 + output, output=output)
    shorter, longer = (
        slots_worth(table, 0, replace(needs, prefix=Prefix("engine", known))) for known in sorted((one, other))
    )
    assert 0 <= shorter <= longer
    assert slots_worth(table, 0, needs) == 0


def test_a_request_goes_as_far_as_the_rows_beside_it_take_back_what_it_saves() -> None:
    stated = replace(NEEDS, prefix=Prefix("engine", 1500))
    lost = 2 * (200 * 0.001 + 500 * 0.0001)  # each row beside it
    assert slots_worth(table_of("engine"), 0, stated) == int(1500 * 0.0006 / lost)
