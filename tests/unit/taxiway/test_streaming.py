"""The events that a reader gets of a streamed answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taxiway.contract.job import Lost, Piece, Progress, Restarted, Result, read_piece, read_position
from tests.builders import a_result


def result(text: object) -> Result:
    return a_result(text=text)


def pieces(*texts: str, attempt: int = 1) -> list[Piece]:
    """Pieces that follow on each other."""
    return [Piece(attempt, len("".join(texts[:n])), text) for n, text in enumerate(texts)]


def tell(progress: Progress, answer: list[Piece]) -> list[object]:
    return [event for n, piece in enumerate(answer) for event in progress.take(f"{n + 1}-0", piece)]


@given(st.lists(st.text(min_size=1, max_size=5), max_size=6), st.integers(0, 6))
def test_whatever_was_streamed_before_the_result_the_text_is_complete(texts: list[str], read: int) -> None:
    progress = Progress()
    events = tell(progress, pieces(*texts)[:read]) + progress.end(result("".join(texts)))
    assert "".join(map(str, events)) == "".join(texts)


def test_what_a_slow_reader_missed_is_counted() -> None:
    progress = Progress()
    first, _, _, last = pieces("one ", "two ", "three ", "four")
    assert tell(progress, [first, last]) == ["one ", Lost(10), "four"]
    assert progress.end(result("one two three four five")) == [" five"]


def test_a_new_attempt_restarts_the_text_and_the_old_one_is_ignored() -> None:
    progress = Progress()
    old, new = pieces("one ", "two "), pieces("uno ", "dos", attempt=2)
    assert tell(progress, [old[0], new[0], old[1], new[1]]) == ["one ", Restarted(2), "uno ", "dos"]


@given(st.text(min_size=1), st.text(), st.data())
def test_a_generation_that_was_cut_goes_on_without_a_seam(text: str, rest: str, data: st.DataObject) -> None:
    read = data.draw(st.integers(0, len(text)))
    old = [Piece(1, 0, text[:read])] if read else []
    progress = Progress()
    events = tell(progress, [*old, Piece(2, 0, text), Piece(1, read, "late"), Piece(2, len(text), rest)])
    assert "".join(map(str, events)) == text + rest
    assert progress.end(result(text + rest)) == []


def test_a_new_attempt_that_has_less_than_was_read_restarts() -> None:
    assert tell(Progress(), [Piece(1, 0, "one two"), Piece(2, 0, "one ")]) == ["one two", Restarted(2), "one "]


def test_an_attempt_that_restarts_says_so() -> None:
    assert tell(Progress(), [*pieces("one ", "two "), *pieces("one")]) == ["one ", "two ", Restarted(1), "one"]


def test_a_new_attempt_whose_beginning_was_missed_has_lost_it() -> None:
    late = pieces("uno ", "dos", attempt=2)[1]
    assert tell(Progress(), [*pieces("one "), late]) == ["one ", Restarted(2), Lost(4), "dos"]


def test_a_piece_that_arrives_twice_is_yielded_once() -> None:
    one, two = pieces("one ", "two ")
    assert tell(Progress(), [one, two, two, Piece(1, 4, "two three")]) == ["one ", "two ", "three"]


def test_a_result_of_another_attempt_than_the_streamed_one_restarts() -> None:
    progress = Progress()
    tell(progress, pieces("one ", "two "))
    assert progress.end(result("uno dos tres")) == [Restarted(2), "uno dos tres"]


def test_a_result_without_text_adds_nothing() -> None:
    assert Progress().end(result([1, 2])) == []


@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=6), st.integers(0, 5))
def test_a_reader_that_reconnects_gets_the_rest(texts: list[str], read: int) -> None:
    first = Progress()
    events = tell(first, pieces(*texts)[:read])
    again = Progress(read_position(str(first.position)))
    events += [
        event for n, piece in enumerate(pieces(*texts)[read:]) for event in again.take(f"{read + n + 1}-0", piece)
    ]
    assert "".join(map(str, events)) == "".join(texts)
    assert again.end(result("".join(texts))) == []


DELTAS = st.lists(st.fixed_dictionaries({"reasoning_content": st.text(max_size=5)}), max_size=3).map(tuple)


@given(
    st.builds(
        Piece,
        *[st.integers(1, 99), st.integers(0, 99), st.text(max_size=9), st.integers(0, 9)],
        tokens=st.integers(0, 99),
    )
    | st.builds(Piece, st.integers(1, 99), st.integers(0, 99), st.just(""), st.integers(0, 9), st.just(7), DELTAS)
)
def test_a_piece_is_read_as_it_was_written(piece: Piece) -> None:
    written = {
        name: value if isinstance(value, bytes) else str(value).encode() for name, value in piece.fields().items()
    }
    assert read_piece(written) == (piece if piece.beside else replace(piece, sent=0))


def test_a_reader_of_text_gets_only_that_of_the_first_row() -> None:
    beside = Piece(1, 4, sent=0, beside=({"tool_calls": []},))
    answer = [Piece(1, 0, "one "), Piece(1, 0, "uno ", row=1), beside, Piece(1, 4, "two")]
    assert tell(Progress(), answer) == ["one ", "two"]


@pytest.mark.parametrize("text", ["", "1-0", "1-0:1:x:0", "a-0:1:2:3", "1-0:1:2:3:4"])
def test_a_position_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|values to unpack|invalid literal"):
        read_position(text)


def test_a_result_of_one_row_sent_as_rows_ends_the_text_as_well() -> None:
    assert Progress().end(result(["all of it"])) == ["all of it"]
