"""Which token comes next, and when a text ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.pipelines.sampling import Sequel, Spelling, Wishes, choose, cut_at, open_end, passed

WORDS = ("<end>", "one ", "two ", "three ")
ENDS = frozenset({0})


def spell(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def after(wishes: Wishes, *tokens: int) -> Sequel:
    """A sequel that takes `tokens` until it is finished."""
    sequel = Sequel(wishes, ENDS, spell)
    for token in tokens:
        if sequel.finish is None:
            sequel.take(token)
    return sequel


def test_a_text_ends_at_the_token_that_ends_texts_and_does_not_count_it() -> None:
    sequel = after(Wishes(9), 1, 2, 0, 3)
    assert (sequel.text, len(sequel.tokens), sequel.finish) == ("one two ", 2, "stop")


def test_a_text_ends_at_its_most_tokens() -> None:
    sequel = after(Wishes(2), 1, 2, 3)
    assert (sequel.text, len(sequel.tokens), sequel.finish) == ("one two ", 2, "length")


def test_a_text_ends_before_the_first_stop_that_it_comes_to_even_across_tokens() -> None:
    sequel = after(Wishes(9, stop=("three", "e tw")), 1, 2, 3)
    assert (sequel.text, sequel.finish) == ("on", "stop")


def test_the_earliest_of_several_stops_cuts() -> None:
    assert cut_at("one two three", ("three", "two")) == 4
    assert cut_at("one two three", ("four",)) is None


def spell_bytes(tokens: Sequence[int]) -> str:
    """Tokens that are bytes, as byte-level vocabularies have them."""
    return bytes(tokens).decode(errors="replace")


@given(st.text(max_size=12))
def test_no_character_is_told_before_its_last_byte_and_all_of_them_are_told(text: str) -> None:
    spelling = Spelling(spell_bytes)
    for byte in text.encode():
        spelling.add(byte)
        assert text.startswith(spelling.text)
    assert spelling.text == text.removesuffix("\ufffd")
    spelling.end()
    assert spelling.text == text


@given(st.binary(max_size=12))
def test_bytes_that_are_no_text_are_told_as_they_decode_together(raw: bytes) -> None:
    spelling = Spelling(spell_bytes)
    told = []
    for byte in raw:
        spelling.add(byte)
        told.append(spelling.text)
    spelling.end()
    assert spelling.text == spell_bytes(raw)
    assert all(spelling.text.startswith(part) for part in told)


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.sampled_from(["e t", "two", "ee one", "o"]), max_size=3))
def test_what_is_told_as_it_comes_is_the_whole_answer(tokens: list[int], stops: list[str]) -> None:
    sequel, told = Sequel(Wishes(9, stop=tuple(stops)), ENDS, spell), ""
    for token in [*tokens, 0]:
        sequel.take(token)
        told += sequel.fresh()
        if sequel.finish:
            break
    assert told == sequel.text
    assert not any(stop in told for stop in stops)


def test_text_that_may_begin_a_stop_is_told_once_it_does_not() -> None:
    sequel = Sequel(Wishes(9, stop=("two three",)), ENDS, spell)
    told = []
    for token in (1, 2, 2, 1):
        sequel.take(token)
        told.append(sequel.fresh())
    assert told == ["one ", "", "two ", "two one "]
    assert open_end("so on", ("one", "once")) == 2


logits = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=20).map(lambda v: np.array(v, np.float32))


def choose_one(row: np.ndarray, temperature: float, draw: float) -> int:
    return choose(row[None], [temperature], [draw])[0]


@given(logits, st.floats(0, 1, exclude_max=True))
def test_temperature_zero_takes_the_likeliest_whatever_is_drawn(row: np.ndarray, draw: float) -> None:
    assert choose_one(row, 0, draw) == row.argmax()


@given(logits, st.floats(0.01, 2), st.floats(0, 1, exclude_max=True))
def test_any_draw_takes_a_token_of_the_vocabulary(row: np.ndarray, temperature: float, draw: float) -> None:
    assert 0 <= choose_one(row, temperature, draw) < len(row)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    row = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    drawn = [choose_one(row, 1, draw) for draw in (np.arange(1000) + 0.5) / 1000]
    assert np.bincount(drawn).tolist() == [500, 300, 200]


def test_a_row_s_token_does_not_depend_on_the_other_rows() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(5, 5000)).astype(np.float32)
    temperatures, draws = [0.7, 0.0, 2.0, 0.1, 1.0], list(random.random(5))
    together = choose(rows, temperatures, draws)
    assert together == [choose_one(*alone) for alone in zip(rows, temperatures, draws, strict=True)]


@given(st.integers(1, 2000), st.floats(0, 1, exclude_max=True), st.integers(0, 9))
def test_blocks_are_passed_where_the_cumulated_sum_is(count: int, draw: float, seed: int) -> None:
    weights = np.random.default_rng(seed).integers(0, 9, count).astype(np.float32) + (np.arange(count) == count // 2)
    cumulated = weights.astype(np.float64).cumsum()
    assert passed(weights, draw) == np.searchsorted(cumulated, draw * cumulated[-1], side="right")


def test_the_same_seed_draws_the_same_text_and_another_seed_may_not() -> None:
    flat = np.zeros(len(WORDS), np.float32)

    def text(seed: int) -> list[int]:
        sequel = Sequel(Wishes(40, temperature=1, seed=seed), frozenset(), spell)
        while sequel.finish is None:
            sequel.take(choose_one(flat, sequel.temperature, sequel.draw()))
        return sequel.tokens

    assert text(1) == text(1) != text(2)
