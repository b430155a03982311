import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.folder import load_catalogue
from tasks.models.profiles import bin_of, generates, length_of, predicted, ran_size, read_lengths, tokens_of
from tasks.settings import TREE

CATALOGUE = load_catalogue(TREE / "models")
TOKENS = st.integers(0, 500_000)
WEIGHTS = st.dictionaries(st.integers(0, 81), st.floats(0.01, 1000))


@given(tokens=TOKENS, more=st.integers(0, 1000))
def test_a_bin_holds_its_tokens_and_reads_them_at_most_a_fifth_too_long(tokens: int, more: int) -> None:
    assert bin_of(tokens) <= bin_of(tokens + more)
    longest = tokens_of(bin_of(tokens))
    assert tokens <= longest <= tokens * 1.19


@given(lengths=WEIGHTS, most=st.integers(-5, 10**12), more=st.integers(0, 100_000))
def test_an_answer_is_predicted_within_what_it_may_be_and_never_shorter_where_it_may_be_longer(
    lengths: dict[int, float], most: int, more: int
) -> None:
    assert 0 <= predicted(lengths, most) <= max(most, 0)
    assert predicted(lengths, most) <= predicted(lengths, most + more)


@given(tokens=st.integers(0, 400), most=st.integers(400, 4000))
def test_a_tenant_whose_answers_are_all_alike_is_predicted_one_more(tokens: int, most: int) -> None:
    assert tokens <= predicted({bin_of(tokens): 100.0}, most) <= tokens * 1.19


@pytest.mark.parametrize(("most", "expected"), [(64, 32), (512, 256), (1, 0), (0, 0)])
def test_half_of_the_most_is_expected_before_any_answer_was_seen(most: int, expected: int) -> None:
    assert predicted({}, most) == expected


@given(raw=st.binary() | st.dictionaries(st.text(), st.floats() | st.text()).map(msgspec.json.encode))
def test_what_the_store_holds_is_read_or_counts_as_nothing(raw: bytes) -> None:
    assert 0 <= predicted(read_lengths(raw), 100) <= 100


def test_only_models_that_generate_have_answers_of_a_length_of_their_own() -> None:
    assert {model.name for model in CATALOGUE.models.values() if generates(model)} == {"chat", "generate"}


def test_a_row_that_ran_counts_what_it_generated_and_the_token_that_ended_it() -> None:
    generate, sentiment = CATALOGUE.resolve("generate"), CATALOGUE.resolve("sentiment")
    stopped = {"text": "Paris.", "tokens": 3, "finish-reason": "stop"}
    full = {"text": "It is", "tokens": 64, "finish-reason": "length"}
    assert (length_of(stopped), length_of(full)) == (4, 64)
    assert ran_size(generate, 104, {"max_tokens": 64}, stopped) == 44
    assert ran_size(generate, 104, {"max_tokens": 64}, full) == 104
    assert ran_size(sentiment, 12, {}, {"label": "positive"}) == 12
