import base64
import re
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.folder import load_catalogue
from tasks.models.model import Model, ModelError, UnitError, parse_model, read_unit
from tasks.models.profiles import bin_of, length_of, predicted, ran_size, read_lengths, tokens_of
from tasks.models.signature import bind
from tasks.models.sizes import measured, quantised, rows_of, size_of_row
from tasks.models.tensor_spec import TensorSpec
from tasks.settings import TREE
from taxiway.errors import RequestTooLargeError, TaxiwayError
from workers.pipelines.tensors import TensorPipeline

MODELS = load_catalogue(TREE / "models")
ISING = MODELS.resolve("ising")
SENTIMENT = MODELS.resolve("sentiment")
IDS = TensorSpec("ids", "INT64", (-1, -1))
PICTURE = TensorSpec("picture", "BYTES", (-1,), optional=True)
PIXELS = TensorSpec("raw", "FP32", (-1, -1, -1, 3), optional=True)


def sized(unit: str, *inputs: TensorSpec, most: int = 1_000_000, pipeline: Any = "tensors") -> Model:
    """A model whose rows are sized by `unit`."""
    fields = {"inputs": inputs, "size_unit": unit, "buckets": (most,), "expected_size": 7, "pipeline": pipeline}
    return msgspec.structs.replace(ISING, **fields)


def tagged(content: bytes) -> dict[str, str]:
    return {"__type__": "base64", "__value__": base64.b64encode(content).decode()}


def tensor(name: str, shape: list[Any], data: Any = None, datatype: str = "INT64") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


SWEEPS = struct.pack("<2q", 1_000, 3_000)


@pytest.mark.cases("inputs", [[tensor("seed", [2], [1, 2]), tensor("sweeps", [2], memoryview(SWEEPS))]])
def test_the_mean_of_a_named_input_is_read_from_every_form_that_inputs_have(inputs: Any) -> None:
    assert measured(ISING, inputs) == 2_000


@pytest.mark.parametrize("sweeps", [None, "many", 1e6, float("nan"), True, {"a": 1}, [], [1, "x"], [[1]]])
def test_a_named_input_that_is_no_integer_counts_as_expected(sweeps: Any) -> None:
    assert measured(ISING, {"sweeps": sweeps, "seed": 1}) == ISING.expected_size


@pytest.mark.parametrize("pipeline", ["chat", "generation"])
def test_a_prompt_far_over_the_context_is_refused_and_one_that_may_fit_is_left_to_its_worker(pipeline: str) -> None:
    model = sized("tokens", TensorSpec("asked", "BYTES", (-1,)), most=128, pipeline=pipeline)
    assert measured(model, "a" * 1_900) > 128
    with pytest.raises(RequestTooLargeError, match="at most 128 tokens of prompt and answer together") as caught:
        measured(model, "a" * 3_000)
    assert caught.value.details == {"field": "inputs.asked", "limit": 128}


def test_of_several_rows_the_wrong_one_is_named() -> None:
    with pytest.raises(RequestTooLargeError, match=r"^inputs.sweeps\[1\]: expected at most 10000000, got 20000000$"):
        measured(ISING, {"sweeps": [5, 20_000_000], "seed": [1, 2]})


@pytest.mark.parametrize("shape", [[4], [], [1] * 100_000, [1, -1], [1, "x"], "ab", None, [1, 1]])
def test_a_shape_that_is_not_the_inputs_counts_as_expected(shape: Any) -> None:
    model = sized("raw", PIXELS)
    assert measured(model, {"raw": tensor("raw", shape)}) == 7


def test_a_shape_of_huge_numbers_is_refused_at_once() -> None:
    with pytest.raises(RequestTooLargeError, match="got a larger one"):
        measured(sized("raw", PIXELS), {"raw": tensor("raw", [1, 10**4200, 10**4200, 3])})


def test_a_text_counts_by_its_length_also_where_it_is_bytes_or_a_blob() -> None:
    text = "x" * 400
    blob = {"ref": "0" * 32, "bytes": 400, "datatype": "BYTES", "digest": "d"}
    assert measured(SENTIMENT, text) == measured(SENTIMENT, tagged(text.encode())) == measured(SENTIMENT, blob) == 102
    assert quantised(SENTIMENT, measured(SENTIMENT, "x" * 10_000)) == SENTIMENT.buckets[-1], "where it is cut"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(st.sampled_from(["shape", "datatype", "data", "name", "ref", "bytes", "__value__", "sweeps",
                                           "ids", "raw", "picture"]), below, max_size=5)
    ),
    max_leaves=12,
)  # fmt: skip
units = st.sampled_from([ISING, SENTIMENT, sized("ids", IDS), sized("ids[1]", IDS), sized("bytes", IDS, PICTURE)])


@given(model=units, inputs=json_values)
def test_nothing_that_a_producer_writes_makes_measuring_fail(model: Model, inputs: Any) -> None:
    assert rows_of(model, inputs) >= 1
    try:
        size = measured(model, inputs)
    except TaxiwayError as error:
        assert len(error.message) < 150
    else:
        assert size >= 1


@given(rows=st.integers(1, 3), width=st.integers(0, 20))
def test_a_router_and_a_worker_measure_the_same(rows: int, width: int) -> None:
    ids = np.zeros((rows, width), np.int64)
    for unit in ("ids", "ids[1]", "bytes"):
        model = sized(unit, IDS)
        asked = [tensor("ids", [rows, width], memoryview(ids.tobytes()))]
        items = [TensorPipeline(model).prepare(row, {}).size for row in bind(model, asked, {}).rows]
        assert max(items) == max(measured(model, asked), 1)


@given(size=st.integers(1, 10_000_000))
def test_a_quantised_size_is_at_most_an_eighth_larger_and_one_of_few(size: int) -> None:
    found = quantised(ISING, size)
    assert size <= found <= size * 1.125
    assert len({quantised(ISING, n) for n in range(size, size + 100)}) <= 2 or size < 1_000


@pytest.mark.cases("unit, path")
def test_a_size_unit_that_the_model_does_not_have_is_named(unit: str, path: str) -> None:
    text = (TREE / "models/ising/model.yaml").read_text().replace("size_unit: sweeps", f"size_unit: '{unit}'")
    with pytest.raises(ModelError) as caught:
        parse_model(text, "model.yaml")
    assert caught.value.path == path


def test_a_size_unit_without_buckets_is_refused_as_every_row_would_be() -> None:
    text = re.sub("buckets: .*", "", (TREE / "models/ising/model.yaml").read_text())
    with pytest.raises(ModelError, match="expected sizes up to that of the largest row, because size_unit is sweeps"):
        parse_model(text, "model.yaml")


def test_rows_and_axes_are_counted_wherever_the_batch_axis_is() -> None:
    state = TensorSpec("state", "FP32", (2, -1, -1), batch_axis=1)
    rate = TensorSpec("rate", "INT64", (), batch_axis=None)
    asked = [tensor("rate", [], 16_000), tensor("state", [2, 5, 128], None, "FP32")]
    assert rows_of(sized("state", rate, state), asked) == 5
    assert measured(sized("state", rate, state), asked) == 256
    assert measured(sized("state[2]", rate, state), asked) == 128
    assert measured(sized("state[0]", rate, state), asked) == 2
    assert measured(sized("rate", rate, state), {"rate": 16_000}) == 16_000
    assert size_of_row(sized("state[2]", rate, state), {"state": np.zeros((2, 128))}) == 128
    with pytest.raises(UnitError):
        read_unit("state[1]", (rate, state), "tensors")


TOKENS = st.integers(0, 500_000)
WEIGHTS = st.dictionaries(st.integers(0, 81), st.floats(0.01, 1000))


@given(tokens=TOKENS, more=st.integers(0, 1000))
def test_a_bin_holds_its_tokens_and_reads_them_at_most_a_fifth_too_long(tokens: int, more: int) -> None:
    assert bin_of(tokens) <= bin_of(tokens + more)
    longest = tokens_of(bin_of(tokens))
    assert tokens <= longest <= tokens * 1.19


@given(lengths=WEIGHTS, most=st.integers(-5, 10**12), more=st.integers(0, 100_000))
def test_a_prediction_is_possible_and_grows_with_the_bound(lengths: dict[int, float], most: int, more: int) -> None:
    assert 0 <= predicted(lengths, most) <= max(most, 0)
    assert predicted(lengths, most) <= predicted(lengths, most + more)


@pytest.mark.parametrize(("most", "expected"), [(64, 32), (512, 256), (1, 0), (0, 0)])
def test_half_of_the_most_is_expected_before_any_answer_was_seen(most: int, expected: int) -> None:
    assert predicted({}, most) == expected


@given(raw=st.binary() | st.dictionaries(st.text(), st.floats() | st.text()).map(msgspec.json.encode))
def test_what_the_store_holds_is_read_or_counts_as_nothing(raw: bytes) -> None:
    assert 0 <= predicted(read_lengths(raw), 100) <= 100


def test_a_row_that_ran_counts_what_it_generated_and_the_token_that_ended_it() -> None:
    generate, sentiment = MODELS.resolve("generate"), MODELS.resolve("sentiment")
    stopped = {"text": "Paris.", "tokens": 3, "finish-reason": "stop"}
    full = {"text": "It is", "tokens": 64, "finish-reason": "length"}
    assert (length_of(stopped), length_of(full)) == (4, 64)
    assert ran_size(generate, 104, {"max_tokens": 64}, stopped) == 44
    assert ran_size(generate, 104, {"max_tokens": 64}, full) == 104
    assert ran_size(sentiment, 12, {}, {"label": "positive"}) == 12
