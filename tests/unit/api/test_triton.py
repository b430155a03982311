from __future__ import annotations

import numpy as np
import pytest

from api.inference.protocol import (
    InferRequest,
    WantedOutput,
    answer_of,
    classes_wanted,
    classified,
    request_of,
    wants_binary,
)
from api.inference.triton import stats_of
from tasks.heartbeat import Ran
from tasks.models.folder import load_catalogue
from tasks.models.model import TensorSpec
from tasks.settings import TREE
from taxiway.contract.job import Result, RunReport
from taxiway.errors import InvalidRequestError

EMBED = load_catalogue(TREE / "models").resolve("embed")
(VECTOR,) = EMBED.outputs
REPORT = RunReport(
    hardware_class="cpu.batch", variant="fp32", device="cpu:0", emulated=False, batch=2, queue_wait=0.0, run_time=0.0,
    cost=0.0, reason="",
)  # fmt: skip


def test_an_output_of_classes_has_the_largest_values_with_their_places_the_largest_first() -> None:
    spec, rows = classified(VECTOR, np.asarray([[0.25, 0.5, 0.125], [1.0, 1.0, 2.0]], np.float32), 2)

    assert (spec.datatype, spec.shape) == ("BYTES", (-1, 2))
    assert rows == [["0.500000:1", "0.250000:0"], ["2.000000:2", "1.000000:0"]]


def test_integers_are_written_as_such_and_more_classes_than_there_are_are_all_of_them() -> None:
    spec, rows = classified(TensorSpec("n", "INT64", (-1, 2)), np.asarray([[3, 7]]), 9)

    assert (spec.shape, rows) == ((-1, 2), [["7:1", "3:0"]])


@pytest.mark.parametrize("raw", [False, True])
def test_an_answer_has_the_classes_that_the_request_wants(raw: bool) -> None:
    parameters = {"classification": 1, "binary_data": raw}
    infer = InferRequest([], outputs=[WantedOutput(name=VECTOR.name, parameters=parameters)])
    row = {"shape": [3], "datatype": "FP32", "data": [0.0, 3.5, 1.0]}
    wanted = classes_wanted(EMBED, {VECTOR.name: parameters})

    framed = answer_of(EMBED, "j", Result(model="embed:1", outputs={VECTOR.name: row}, report=REPORT),
                       wants_binary(infer), None, wanted)  # fmt: skip

    assert b'"shape":[1,1],"datatype":"BYTES"' in framed.body
    assert (b"3.500000:1" in framed.text) is not raw
    assert b"3.500000:1" in framed.body


def test_an_output_in_shared_memory_is_refused_by_name() -> None:
    wanted = WantedOutput(name="n", parameters={"shared_memory_region": "mine", "shared_memory_byte_size": 8})
    with pytest.raises(InvalidRequestError, match=r"outputs\.n\.shared_memory_region: expected no shared memory"):
        request_of("m", InferRequest([], outputs=[wanted]))


@pytest.mark.parametrize("count", [0, -1, 1.0, "1", True, None])
def test_a_number_of_classes_is_one_or_refused_by_name(count: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        classes_wanted(EMBED, {VECTOR.name: {"classification": count}})
    assert caught.value.details["field"] == f"outputs.{VECTOR.name}.classification"


@pytest.mark.parametrize(("number", "name"), [(0, None), (1, "high"), (2, "normal"), (3, "low"), (2**70, "low")])
def test_a_number_is_a_priority(number: int, name: str | None) -> None:
    assert request_of("m", InferRequest([], parameters={"priority": number})).priority == name


@pytest.mark.parametrize(("timeout", "deadline"), [(0, None), (1, 1e-6), (2_500_000, 2.5)])
def test_a_timeout_is_a_deadline(timeout: int, deadline: float | None) -> None:
    request = request_of("m", InferRequest([], parameters={"timeout": timeout}))
    assert (request.deadline, request.parameters) == (deadline, {})


def test_a_deadline_of_our_own_precedes_a_timeout() -> None:
    assert request_of("m", InferRequest([], parameters={"timeout": 1, "deadline": 3.0})).deadline == 3.0


@pytest.mark.parametrize("timeout", [-1, 1.5, "1", True])
def test_a_timeout_is_microseconds_or_refused_by_name(timeout: object) -> None:
    with pytest.raises(InvalidRequestError, match="timeout: expected a whole number of microseconds"):
        request_of("m", InferRequest([], parameters={"timeout": timeout}))


def test_statistics_are_counts_and_nanoseconds() -> None:
    answer = stats_of(
        EMBED, Ran(answered=4, failed=1, rows=8, batches=2.0, queue=0.5, run=0.25, total=1.0, lost=3.0, last=7.0)
    )
    stats = answer["inference_stats"]

    assert (answer["inference_count"], answer["execution_count"], answer["last_inference"]) == (8, 2, 7000)
    assert stats["success"] == {"count": 4, "ns": 1_000_000_000}
    assert stats["fail"] == {"count": 1, "ns": 3_000_000_000}
    assert (stats["queue"]["ns"], stats["compute_infer"]["ns"]) == (500_000_000, 250_000_000)
