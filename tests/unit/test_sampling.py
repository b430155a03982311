"""Which token comes next, and when a text ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.pipelines.sampling import Sequel, Wishes, choose, cut_at

WORDS = ("<end>", "one ", "two ", "three ")
ENDS = frozenset({0})


def spell(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def after(wishes: Wishes, *tokens: int) -> Sequel:
    """A sequel whose logits always ask for the next of `tokens`, until it is finished."""
    sequel = Sequel(wishes, ENDS, spell)
    for token in tokens:
        if sequel.finish is None:
            sequel.take(np.eye(len(WORDS), dtype=np.float32)[token] * 50)
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


logits = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=20).map(lambda v: np.array(v, np.float32))


@given(logits, st.floats(0, 1, exclude_max=True))
def test_temperature_zero_takes_the_likeliest_whatever_is_drawn(row: np.ndarray, draw: float) -> None:
    assert choose(row, 0, draw) == row.argmax()


@given(logits, st.floats(0.01, 2), st.floats(0, 1, exclude_max=True))
def test_any_draw_takes_a_token_of_the_vocabulary(row: np.ndarray, temperature: float, draw: float) -> None:
    assert 0 <= choose(row, temperature, draw) < len(row)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    row = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    drawn = [choose(row, 1, draw) for draw in (np.arange(1000) + 0.5) / 1000]
    assert np.bincount(drawn).tolist() == [500, 300, 200]


def test_the_same_seed_draws_the_same_text_and_another_seed_may_not() -> None:
    flat = np.zeros(len(WORDS), np.float32)

    def text(seed: int) -> list[int]:
        sequel = Sequel(Wishes(40, temperature=1, seed=seed), frozenset(), spell)
        while sequel.finish is None:
            sequel.take(flat)
        return sequel.tokens

    assert text(1) == text(1) != text(2)
