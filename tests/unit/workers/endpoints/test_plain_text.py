"""Prompts that go on as plain text, and answers of another fleet as they come."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.model import Profile, Variant
from tasks.models.tensor_spec import TensorSpec
from taxiway.contract.generation import CutGeneration
from taxiway.contract.peers import PeerAnswer, PeerPiece
from tests.builders import a_text_model
from tests.unit.workers.endpoints.test_endpoint_protocols import CHAT, HELLO, RAW, event, piece
from workers.endpoints import openai
from workers.endpoints.plain_text import LLAMA_CPP, TEMPLATE, VLLM
from workers.endpoints.protocol import AskItem, EndpointError, EngineRequest, ServedModel
from workers.endpoints.taxiway import PeerReader, batched, only_row, prepare

KEPT = CutGeneration(1, "Once upon", 2)


def chat(engine: str, **fields: Any) -> AskItem:
    request = HELLO | {"max_tokens": 10} | fields
    return openai.prepare(
        ServedModel(CHAT, CHAT.variants["onnx"], "m", {engine}), {"request": request}, {"max_tokens": 64}
    )


def prompt(**parameters: Any) -> AskItem:
    served = ServedModel(RAW, RAW.variants["onnx"], "m")
    return openai.prepare(served, {"prompt": "Tell"}, {"max_tokens": 10, **parameters})


def rest_of(item: AskItem, kept: CutGeneration = KEPT, template: str = "") -> tuple[EngineRequest, Any]:
    """The request for the rest of an answer, and its body; the engine's template makes this of the chat."""
    assert item.go_on is not None
    going = item.go_on(kept)
    try:
        _, path, _ = next(going)
        assert path == TEMPLATE
        going.send(json.dumps({"prompt": template}).encode())
    except StopIteration as found:
        assert isinstance(found.value, EngineRequest)
        return found.value, json.loads(found.value.body)
    raise AssertionError("it asks for more")


def test_llama_cpp_reads_its_own_template_and_the_text() -> None:
    request, body = rest_of(chat(LLAMA_CPP, stop=["END"], top_k=5), template="<user>Hello<assistant>")
    assert request.path == "/completions"
    assert (body["prompt"], body["max_tokens"]) == ("<user>Hello<assistant>Once upon", 8)
    assert (body["stop"], body["top_k"], body["timings_per_token"], "messages" in body) == (["END"], 5, True, False)


def test_vllm_continues_the_assistants_message() -> None:
    request, body = rest_of(chat(VLLM, min_tokens=5))
    assert request.path == "/chat/completions"
    assert body["messages"] == [*HELLO["messages"], {"role": "assistant", "content": "Once upon"}]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert (body["max_tokens"], body["min_tokens"]) == (8, 3)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    _, body = rest_of(chat(VLLM, max_tokens=None, max_completion_tokens=5))
    assert (body["max_tokens"], "max_completion_tokens" in body) == (3, False), "of a limit under its newer name"


def test_any_engine_continues_a_prompt() -> None:
    request, body = rest_of(prompt())
    assert (request.path, body["prompt"], body["max_tokens"]) == ("/completions", "TellOnce upon", 8)


def test_nothing_is_asked_for_where_nothing_is_left() -> None:
    item = chat(VLLM)
    assert item.go_on is not None
    with pytest.raises(StopIteration) as ended:
        next(item.go_on(CutGeneration(1, "All of it", 10)))
    answer = ended.value.value
    assert (answer["text"], answer["tokens"], answer["finish-reason"]) == ("All of it", 10, "length")


@pytest.mark.cases("fields")
def test_an_answer_of_more_than_text_does_not_go_on(fields: dict[str, Any]) -> None:
    item = chat(LLAMA_CPP, **fields)
    assert (item.plain, item.go_on) == (False, None)


def test_a_chat_at_an_unknown_engine_is_plain_and_cannot_go_on() -> None:
    item = chat("somebody", seed=7)
    assert (item.plain, item.go_on, item.seed) == (True, None, 7)


@pytest.mark.parametrize(("engine", "goes_on"), [(LLAMA_CPP, True), (VLLM, False)])
def test_penalties_of_what_was_written_carry_over_only_where_a_prompt_counts_too(engine: str, goes_on: bool) -> None:
    assert (chat(engine, presence_penalty=0.5).go_on is not None) is goes_on


def test_the_answer_and_its_usage_are_those_of_an_undisturbed_one() -> None:
    request, _ = rest_of(chat(VLLM))
    reader = request.read({})
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    parts = reader.feed(piece(content=" a") + piece(content=" time") + piece("stop") + event(choices=[], usage=usage))
    assert "".join(map(str, parts)) == " a time"
    answer = reader.answer()
    assert (answer["text"], answer["tokens"]) == ("Once upon a time", 5)
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (9, 5)
    assert reader.tokens is not None
    assert (reader.tokens.input, reader.tokens.output) == (11, 3)


def test_the_tokens_of_the_text_so_far_are_those_that_llama_cpp_counts() -> None:
    item = chat(LLAMA_CPP)
    assert item.ask is not None
    reader = item.ask.read({})
    choice = {"index": 0, "delta": {"content": "two"}}
    reader.feed(event(choices=[choice], timings={"cache_n": 4, "prompt_n": 3, "predicted_n": 2}))
    assert (reader.text, reader.written, reader.more) == ("two", 2, False)
    assert reader.tokens is not None
    assert (reader.tokens.input, reader.tokens.cached, reader.tokens.output) == (7, 4, 2)
    reader.feed(piece(reasoning_content="hm"))
    assert reader.more


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
