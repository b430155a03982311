"""An answer from another fleet, which may come in pieces, twice, and wrong."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.model import Profile, Variant
from tasks.models.tensor_spec import TensorSpec
from taxiway.contract.peers import PeerAnswer, PeerPiece
from tests.builders import a_text_model
from workers.endpoints.protocol import EndpointError, ServedModel
from workers.endpoints.taxiway import PeerReader, batched, only_row, prepare

MODEL = a_text_model(taxiway=Variant(runtime="taxiway", profiles={"endpoint": Profile(base=1.0)}))


def stated(reader: PeerReader, text: str, cuts: list[int]) -> str:
    """What a reader passes on of a text that comes in pieces."""
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [PeerPiece("k", at, text[at:end]) for at, end in pairwise(bounds)]
    return "".join(str(part) for piece in pieces for part in reader.take(piece))


@given(text=st.text(max_size=40), first=st.lists(st.integers(0, 99)), again=st.lists(st.integers(0, 99)))
def test_text_that_comes_again_after_a_cut_is_passed_on_once(text: str, first: list[int], again: list[int]) -> None:
    reader = PeerReader(MODEL)
    assert stated(reader, text, first) + stated(reader, text, again) == text


def test_deltas_that_come_again_are_passed_on_once() -> None:
    reader = PeerReader(MODEL)
    deltas: list[dict[str, Any]] = [{"tool_calls": [{"index": 0}]}, {"reasoning_content": "hm"}]
    assert reader.take(PeerPiece("k", 0, "", 0, deltas[:1])) == deltas[:1]
    assert reader.take(PeerPiece("k", 0, "", 0, deltas)) == deltas[1:]
    assert reader.take(PeerPiece("k", 0, "", 1, deltas[1:])) == []


def test_an_answer_without_an_end_is_the_sites_fault() -> None:
    with pytest.raises(EndpointError, match="without an end"):
        PeerReader(MODEL).take(PeerPiece("k", 2**40, "x"))
    with pytest.raises(EndpointError, match="ended before"):
        PeerReader(MODEL).answer()


@pytest.mark.parametrize("outputs", [{}, {"label": "good"}, {"label": []}, {"label": ["good", "bad"]}, {"label": 1}])
def test_outputs_that_are_no_batch_of_one_are_the_sites_fault(outputs: dict[str, object]) -> None:
    reader = PeerReader(MODEL)
    reader.end(PeerAnswer("k", {spec.name: outputs.get("label") for spec in MODEL.outputs} if outputs else {}, 0.0))
    with pytest.raises(EndpointError, match="malformed"):
        reader.answer()


def test_a_row_is_a_batch_of_one_on_its_way() -> None:
    (name,) = [spec.name for spec in MODEL.inputs]
    served = ServedModel(MODEL, next(iter(MODEL.variants.values())), "mood")
    item = prepare(served, {name: "a calm flight"}, {"x": None})
    assert item.ask is not None
    assert item.ask.path == "mood"
    assert b"a calm flight" in item.ask.body
    assert b"\x81\xa4text\x91" in item.ask.body


def test_an_array_keeps_its_type_and_gets_its_batch_axis() -> None:
    spec = TensorSpec(name="a", datatype="FP32", shape=(2, -1), batch_axis=1)
    sent = batched(spec, np.array([1.5, 2.5], np.float32))
    assert (sent["shape"], sent["datatype"]) == ([2, 1], "FP32")
    assert only_row(spec, sent).tolist() == [1.5, 2.5]
