"""Which token comes next, and when a text ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.pipelines.sampling import Detokenizer, GeneratedText, SamplingParameters, choose, cut_at, open_end, passed

WORDS = ("<end>", "one ", "two ", "three ")
ENDS = frozenset({0})


def spell(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def after(sampling: SamplingParameters, *tokens: int) -> GeneratedText:
    """A sequel that takes `tokens` until it is finished."""
    generated = GeneratedText(sampling, ENDS, spell)
    for token in tokens:
        if generated.finish is None:
            generated.take(token)
    return generated


def test_a_text_ends_at_the_token_that_ends_texts_and_does_not_count_it() -> None:
    generated = after(SamplingParameters(9), 1, 2, 0, 3)
    assert (generated.text, len(generated.tokens), generated.finish) == ("one two ", 2, "stop")


def test_the_probabilities_of_tokens_are_returned_on_request() -> None:
    generated, logits = GeneratedText(SamplingParameters(9, logprobs=2), ENDS, spell), np.log([0.1, 0.2, 0.3, 0.4])
    generated.take(1, logits.astype(np.float32))
    generated.take(0, logits.astype(np.float32))

    (told,) = generated.logprobs
    likely = told["top_logprobs"]
    assert (told["token"], told["bytes"]) == ("one ", list(b"one "))
    assert [one["token"] for one in likely] == ["three ", "two "]
    said = [told["logprob"], *(one["logprob"] for one in likely)]
    np.testing.assert_allclose(said, np.log([0.2, 0.4, 0.3]), rtol=1e-5)
    assert after(SamplingParameters(9), 1).logprobs == []


def test_a_text_ends_at_its_most_tokens() -> None:
    generated = after(SamplingParameters(2), 1, 2, 3)
    assert (generated.text, len(generated.tokens), generated.finish) == ("one two ", 2, "length")


def test_a_text_ends_before_the_first_stop_that_it_comes_to_even_across_tokens() -> None:
    generated = after(SamplingParameters(9, stop=("three", "e tw")), 1, 2, 3)
    assert (generated.text, generated.finish) == ("on", "stop")


def test_the_earliest_of_several_stops_cuts() -> None:
    assert cut_at("one two three", ("three", "two")) == 4
    assert cut_at("one two three", ("four",)) is None


def spell_bytes(tokens: Sequence[int]) -> str:
    """Tokens that are bytes, as byte-level vocabularies have them."""
    return bytes(tokens).decode(errors="replace")


@given(st.text(max_size=12))
def test_a_character_appears_with_its_last_byte_and_none_is_lost(text: str) -> None:
    detokenizer = Detokenizer(spell_bytes)
    for byte in text.encode():
        detokenizer.add(byte)
        assert text.startswith(detokenizer.text)
    assert detokenizer.text == text.removesuffix("\ufffd")
    detokenizer.end()
    assert detokenizer.text == text


@given(st.binary(max_size=12))
def test_invalid_bytes_decode_as_they_do_all_at_once(raw: bytes) -> None:
    detokenizer = Detokenizer(spell_bytes)
    streamed = []
    for byte in raw:
        detokenizer.add(byte)
        streamed.append(detokenizer.text)
    detokenizer.end()
    assert detokenizer.text == spell_bytes(raw)
    assert all(detokenizer.text.startswith(part) for part in streamed)


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.sampled_from(["e t", "two", "ee one", "o"]), max_size=3))
def test_the_streamed_pieces_are_the_whole_answer(tokens: list[int], stops: list[str]) -> None:
    generated, streamed = GeneratedText(SamplingParameters(9, stop=tuple(stops)), ENDS, spell), ""
    for token in [*tokens, 0]:
        generated.take(token)
        streamed += generated.new_text()
        if generated.finish:
            break
    assert streamed == generated.text
    assert not any(stop in streamed for stop in stops)


def test_text_that_may_begin_a_stop_is_streamed_once_it_does_not() -> None:
    generated = GeneratedText(SamplingParameters(9, stop=("two three",)), ENDS, spell)
    streamed = []
    for token in (1, 2, 2, 1):
        generated.take(token)
        streamed.append(generated.new_text())
    assert streamed == ["one ", "", "two ", "two one "]
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
        generated = GeneratedText(SamplingParameters(40, temperature=1, seed=seed), frozenset(), spell)
        while generated.finish is None:
            generated.take(choose_one(flat, generated.temperature, generated.draw()))
        return generated.tokens

    assert text(1) == text(1) != text(2)
