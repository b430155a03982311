"""What is left of a generation that was cut, by its record and its stream."""

from hypothesis import given
from hypothesis import strategies as st

from taxiway.contract.generation import CutGeneration, total, with_streamed
from taxiway.contract.job import GenerationPart, Tokens
from taxiway.contract.stream import Piece

WORDS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8)


def streamed(words: list[str], attempt: int = 1) -> list[Piece]:
    """Each word a token and a piece."""
    return [Piece(attempt, len("".join(words[:n])), word, tokens=n + 1) for n, word in enumerate(words)]


@given(WORDS, st.data())
def test_what_readers_got_beyond_what_was_kept_belongs_to_it(words: list[str], data: st.DataObject) -> None:
    kept, trimmed = sorted((data.draw(st.integers(0, len(words))), data.draw(st.integers(0, len(words)))), reverse=True)
    before = CutGeneration(1, "".join(words[:kept]), kept)
    whole = CutGeneration(1, "".join(words), len(words))
    assert with_streamed(before, streamed(words)[trimmed:]) == whole


@given(WORDS, WORDS)
def test_a_later_claim_that_began_again_counts_and_an_earlier_one_does_not(old: list[str], new: list[str]) -> None:
    kept = CutGeneration(1, "".join(old), len(old))
    assert with_streamed(kept, streamed(new, attempt=2)) == CutGeneration(2, "".join(new), len(new))
    later = CutGeneration(3, "".join(old), len(old))
    assert with_streamed(later, streamed(new, attempt=2)) == later


def test_a_stream_with_a_gap_or_with_more_than_text_adds_nothing() -> None:
    kept = CutGeneration(1, "one ", 1)
    assert with_streamed(kept, [Piece(1, 8, "three", tokens=3)]) == kept
    assert with_streamed(kept, [Piece(1, 4, "two", tokens=2), Piece(1, 7, beside=({"tool_calls": []},))]) == kept
    assert with_streamed(kept, [Piece(1, 4, "two", row=1, tokens=2)]) == kept


def test_the_parts_add_up() -> None:
    part = GenerationPart(hardware_class="c", variant="v", device="d", tokens=Tokens(input=5, cached=2, output=3))
    assert total([part, part]) == Tokens(input=10, cached=4, output=6)
