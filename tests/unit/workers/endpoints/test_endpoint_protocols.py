"""What is sent to each engine and read from it, also where a chat goes on as plain text."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.model import Model, Profile, Variant
from tasks.models.tensor_spec import TensorSpec
from taxiway.contract.job import Tokens
from taxiway.contract.peers import PeerAnswer, PeerPiece
from taxiway.contract.stream import CutGeneration
from taxiway.contract.tensors import HEADER, SIZE, bytes_part
from taxiway.errors import InvalidRequestError
from tests.builders import a_text_model
from tests.narrowing import present
from tests.unit.tasks.test_catalogue import model as described
from workers.endpoints import oip, openai, protocol
from workers.endpoints.plain_text import LLAMA_CPP, TEMPLATE, VLLM
from workers.endpoints.protocol import AskItem, EndpointError, EngineRequest, ServedModel
from workers.endpoints.taxiway import PeerReader, batched, only_row, prepare
from workers.port import Row


def engine_model(
    runtime: str = "openai", *, texts: tuple[str, ...] = ("text",), entry: str = "", **fields: Any
) -> Model:
    """A model on an endpoint with inputs of text."""
    variant = {"runtime": runtime, "profiles": {"endpoint": {"base": 0.1, "slope": 0}}}
    named = [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in texts]
    variants = {"onnx": variant | ({"entry": entry} if entry else {})}
    return described(**({"inputs": named, "variants": variants} | fields))


GENERATED: dict[str, Any] = {
    "parameters": {"max_tokens": {"type": "integer", "default": 64}},
    "outputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("text", "tokens", "finish-reason")],
}
CHAT = engine_model(pipeline="chat", texts=("request",), **GENERATED)
PROMPT = engine_model(pipeline="generation", texts=("prompt",), **GENERATED)
RAW = engine_model(pipeline="generation", texts=("prompt",), entry="completions", **GENERATED)
EMBED = engine_model(outputs=[{"name": "embedding", "datatype": "FP32", "shape": [-1, 3]}])
TENSORS = engine_model(
    "oip",
    pipeline="tensors",
    inputs=[
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "word", "datatype": "BYTES", "shape": [-1]},
        {"name": "rate", "datatype": "INT64", "shape": [1], "batch_axis": None},
    ],
    outputs=[{"name": "y", "datatype": "FP32", "shape": [-1, 2]}, {"name": "said", "datatype": "BYTES", "shape": [-1]}],
)
MOST = Tokens(input=100, output=64)
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def prepared(model: Model, row: Row, **parameters: Any) -> protocol.AskItem:
    return openai.prepare(protocol.ServedModel(model, model.variants["onnx"], "m"), row, parameters)


def chat(request: Any, **parameters: Any) -> protocol.AskItem:
    return prepared(CHAT, {"request": request}, **{"max_tokens": 64, **parameters})


def reader_of(item: protocol.AskItem, *pieces: bytes) -> Any:
    """What reads the answer to it, which came in these pieces."""
    reader = present(item.ask).read({})
    for one in pieces:
        reader.feed(one)
    return reader


def sent(item: protocol.AskItem) -> Any:
    return json.loads(present(item.ask).body)


def event(**fields: Any) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def piece(finish: str | None = None, **delta: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
TELLING = (
    piece(role="assistant", content="")
    + b": keep-alive\n\n"
    + piece(content="Grüß ")
    + piece(content="Gott 🙂")
    + piece("stop")
    + event(choices=[], usage=USAGE)
    + b"data: [DONE]\n\n"
)


def read(raw: bytes, *sizes: int) -> tuple[str, Row]:
    """The text and the answer of a streamed response that arrived in pieces of these sizes."""
    reader, answer, at = openai.StreamReader(MOST), "", 0
    for size in (*sizes, len(raw)):
        answer += "".join(part for part in reader.feed(raw[at : at + size]) if isinstance(part, str))
        at += size
    return answer, reader.answer()


def test_a_chat_is_streamed_and_its_own_fields_reach_the_engine() -> None:
    request = HELLO | {"model": "gpt-4o", "stream": False, "temperature": 0.5, "tools": [], "max_tokens": 7}
    item = chat(request)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    assert sent(item) == HELLO | {"model": "m", "temperature": 0.5, "tools": [], "max_tokens": 7} | usage
    assert sent(chat(HELLO))["max_tokens"] == 64
    assert "max_tokens" not in sent(chat(HELLO | {"max_completion_tokens": 5}))
    assert (item.size, item.parameters["max_tokens"]) == (8, 7)
    assert sent(chat(json.dumps(HELLO)))["messages"] == HELLO["messages"]


@pytest.mark.cases(
    "request_, message",
    [
        (HELLO | {"max_tokens": 10**400}, "inputs.request.max_tokens: expected an integer from 1 to 2147483648, got 1"),
        (HELLO | {"seed": 10**400}, "inputs.request.seed: expected an integer of 64 bits, got 1"),
    ],
)
def test_what_is_no_chat_is_the_callers_error(request_: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(request_)
    assert message in caught.value.message


def test_an_image_that_came_as_bytes_is_a_data_url() -> None:
    parts = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": b"\x89PNG..", "detail": "low"}},
    ]
    (message,) = sent(chat({"messages": [{"role": "user", "content": parts}]}))["messages"]
    assert message["content"][1]["image_url"] == {"url": "data:image/png;base64,iVBORy4u", "detail": "low"}


@given(sizes=st.lists(st.integers(0, 60), max_size=30))
def test_a_streamed_answer_is_the_same_however_it_is_cut(sizes: list[int]) -> None:
    received, answer = read(TELLING, *sizes)
    assert received == answer["text"] == "Grüß Gott 🙂"
    assert answer["message"] == {"role": "assistant", "content": "Grüß Gott 🙂"}
    assert (answer["tokens"], answer["finish-reason"]) == (3, "stop")
    assert answer["usage"] == USAGE | {"prompt_tokens_details": None, "completion_tokens_details": None}


def test_what_is_beside_the_text_is_passed_on_as_it_comes() -> None:
    call = {"index": 3, "id": "c", "function": {"name": "f", "arguments": ""}}
    raw = piece(reasoning_content="hm") + piece(content="a") + piece(tool_calls=[call])
    raw += piece(tool_calls=[{"index": 3, "function": {"name": None, "arguments": "{}"}}]) + piece("tool_calls")
    reader = openai.StreamReader(MOST)
    assert reader.feed(raw) == [
        {"reasoning_content": "hm"},
        "a",
        {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
    ]
    message = reader.answer()["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "a")
    assert message["tool_calls"] == [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert (reader.answer()["tokens"], reader.answer()["usage"]) == (4, None)


def test_probabilities_of_a_completions_tokens_have_the_form_of_a_chats() -> None:
    lists = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -2.0}], "text_offset": [0]}
    reader = openai.StreamReader(MOST)
    raw = event(choices=[{"index": 0, "text": "a", "logprobs": lists, "finish_reason": "stop"}])
    stated = {"token": "a", "logprob": -0.5, "bytes": [97]}
    likely = [{"token": "b", "logprob": -2.0, "bytes": [98]}]
    assert reader.feed(raw) == ["a", {"logprobs": [{**stated, "top_logprobs": likely}]}]
    assert reader.answer()["logprobs"] == {"content": [{**stated, "top_logprobs": likely}]}


def test_a_prompt_is_a_chat_or_sent_as_it_is() -> None:
    asked = {"max_tokens": 5, "temperature": 0, "seed": None, "logprobs": 2}
    alone, raw = (prepared(model, {"prompt": "Hi"}, **asked) for model in (PROMPT, RAW))
    assert sent(alone)["messages"] == [{"role": "user", "content": "Hi"}]
    assert (sent(alone)["logprobs"], sent(alone)["top_logprobs"]) == (True, 2), "as a chat asks for them"
    assert (sent(raw)["prompt"], sent(raw)["logprobs"]) == ("Hi", 2)
    assert not {"seed", "top_logprobs"} & sent(raw).keys()
    assert present(raw.ask).path == "/completions"
    reader = reader_of(raw)
    assert reader.feed(event(choices=[{"index": 0, "text": "yes", "finish_reason": "length"}])) == ["yes"]
    assert reader.answer()["finish-reason"] == "length"


@given(length=st.integers(0, TELLING.index(b'"stop"')))
def test_a_truncated_stream_is_the_endpoints_fault(length: int) -> None:
    with pytest.raises(protocol.EndpointError, match="ended before the answer did") as caught:
        read(TELLING[:length])
    assert caught.value.kind is protocol.FaultKind.BROKEN


@pytest.mark.cases("raw, reason")
def test_a_malformed_stream_is_the_endpoints_fault(raw: bytes, reason: str) -> None:
    with pytest.raises(protocol.EndpointError, match=reason):
        read(piece(content="so far") + raw)


UNENDING: dict[str, tuple[bytes, int]] = {
    "text": (piece(content="x" * 200_000), 5),
    "text and a high limit": (piece(content="x" * 200_000), 10**9),
    "pieces": (piece(content="x") * 100, 5),
    "empty events": (piece(content="") * 20_000, 5),
    "comments": (b": still here\n\n" * 10_000, 5),
    "reasoning": (piece(reasoning_content="x") * 100, 5),
    "calls": (piece(tool_calls=[{"index": 0, "function": {"arguments": "x" * 20_000}}]) * 10, 10**9),
}


@pytest.mark.parametrize(("chunk", "output"), UNENDING.values(), ids=UNENDING)
def test_an_answer_without_an_end_is_malformed(chunk: bytes, output: int) -> None:
    reader, received = openai.StreamReader(Tokens(input=9, output=output)), 0
    with pytest.raises(protocol.EndpointError, match="malformed") as caught:
        while received < 4 * openai.MAX_STREAM:
            reader.feed(chunk)
            received += len(chunk)
    assert caught.value.kind is protocol.FaultKind.BROKEN


def test_an_embedding_is_read_as_an_array_and_a_document_is_scored_by_its_query() -> None:
    item = prepared(EMBED, {"text": "Hi"})
    answer = reader_of(item, b'{"data": [{"embedding": [1, 2.5, 3]}]}').answer()
    np.testing.assert_array_equal(answer["embedding"], np.array([1, 2.5, 3], np.float32))
    with pytest.raises(protocol.EndpointError, match="expected one embedding, got 0"):
        reader_of(item, b'{"data": []}').answer()
    with pytest.raises(protocol.EndpointError, match="more than"):
        reader_of(item, b" " * (openai.MAX_ONE + 1))
    score = [{"name": "score", "datatype": "FP32", "shape": [-1]}]
    ranking = engine_model(texts=("query", "document"), outputs=score, entry="rerank")
    item = prepared(ranking, {"query": "who", "document": "he"})
    assert sent(item) == {"model": "m", "query": "who", "documents": ["he"], "top_n": 1}
    scored = b'{"results": [{"index": 0, "relevance_score": 0.75}], "usage": {"total_tokens": 4}}'
    assert reader_of(item, scored).answer() == {"score": 0.75}
    with pytest.raises(protocol.EndpointError, match="expected one score, got 0"):
        reader_of(item, b'{"results": []}').answer()


def tensors(about: bytes = b'{"extensions": ["binary_tensor_data"]}', **row: Any) -> protocol.AskItem:
    row = {"x": [1.5, 2.0], "word": "ü", "rate": np.array([7]), **row}
    served = protocol.ServedModel(TENSORS, TENSORS.variants["onnx"], "a/b", oip.extensions(about))
    return oip.prepare(served, row, {})


def test_tensors_are_sent_in_json_to_a_server_that_announces_no_binary_data() -> None:
    ask = present(tensors(b'{"name": "mlserver", "extensions": []}').ask)
    assert {name.lower() for name in ask.headers} == {"content-type"}
    asked = json.loads(ask.body)
    assert [(one["name"], one["shape"], one["data"]) for one in asked["inputs"]] == [
        *(("x", [1, 2], [1.5, 2.0]), ("word", [1], ["ü"]), ("rate", [1], [7]))
    ]
    assert asked["outputs"] == [{"name": "y"}, {"name": "said"}]
    for wrong in ({"x": [np.nan, 1.0]}, {"word": b"\xff"}):
        with pytest.raises(InvalidRequestError, match="as the endpoint reads JSON alone"):
            tensors(b"{}", **wrong)


def test_binary_and_plain_outputs_are_read() -> None:
    said = bytes_part([b"ja"])
    outputs: list[dict[str, Any]] = [
        {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [3, 4.5]},
        {"name": "said", "datatype": "BYTES", "shape": [1], "parameters": {SIZE: len(said)}},
    ]
    text = msgspec.json.encode({"outputs": outputs})
    reader = present(tensors().ask).read({HEADER: str(len(text))})
    reader.feed(text[:9])
    reader.feed(text[9:] + said)
    assert (list(reader.answer()["y"]), reader.answer()["said"]) == ([3, 4.5], "ja")
    plain = {"outputs": [outputs[0], outputs[1] | {"data": ["ja"], "parameters": {}}]}
    assert reader_of(tensors(), msgspec.json.encode(plain)).answer()["said"] == "ja"


@given(
    raw=st.binary(max_size=40) | st.sampled_from([b'{"outputs": []}', b'{"outputs": [{"name": "y"}]}']),
    length=st.none() | st.text(max_size=3),
)
def test_any_other_answer_is_malformed(raw: bytes, length: str | None) -> None:
    reader = present(tensors().ask).read({} if length is None else {HEADER: length})
    reader.feed(raw)
    with pytest.raises(protocol.EndpointError, match="malformed"):
        reader.answer()


@pytest.mark.cases("status, body, kind")
def test_a_request_of_its_own_fault_ends_with_the_engines_words(status: int, body: Any, kind: type[Exception]) -> None:
    error = protocol.refused(status, {}, msgspec.json.encode(body), 0.0)
    assert type(error) is kind
    assert "bad field" in str(error)


@pytest.mark.parametrize(
    ("kind", "status", "after"),
    [("BUSY", 429, ""), ("BUSY", 503, "3"), *(("BROKEN", status, "") for status in (500, 503))]
    + [("UNREACHED", status, "") for status in (401, 404, 307)],
)
def test_everything_else_is_the_endpoints_fault(kind: str, status: int, after: str) -> None:
    error = protocol.refused(status, {"Retry-After": after} if after else {}, b"<html>no", 0.0)
    assert isinstance(error, protocol.EndpointError)
    assert error.kind is protocol.FaultKind[kind]
    assert "<html>no" in error.reason


@pytest.mark.parametrize("status", [400, 503])
def test_a_server_that_is_not_ready_is_starting(status: int) -> None:
    error = protocol.unready(status, {}, b"", 0.0)
    assert isinstance(error, protocol.EndpointError)
    assert (error.kind, error.reason) == (protocol.FaultKind.STARTING, f"the endpoint is starting: {status}")
    assert str(protocol.unready(404, {}, b"no", 0.0)) == str(protocol.refused(404, {}, b"no", 0.0))


@pytest.mark.parametrize(
    "form", [str.encode, lambda t: msgspec.json.encode({"error": t}), lambda t: msgspec.json.encode({"detail": t})]
)
def test_of_an_engines_traceback_the_last_line_is_told(form: Callable[[str], bytes]) -> None:
    trace = 'Traceback (most recent call last):\n  File "/srv/secret.py", line 1\nValueError: bad\n'
    error = protocol.refused(500, {}, form(trace), 0.0)
    assert isinstance(error, protocol.EndpointError)
    assert error.reason == "the endpoint failed: 500: ValueError: bad"


@pytest.mark.cases(
    "text, now, seconds",
    [("9" * 400, 0.0, protocol.LONGEST_WAIT), *((odd, 0.0, protocol.BUSY_FOR) for odd in ("soon", ""))],
)
def test_retry_after_is_seconds_or_a_date_and_bounded(text: str, now: float, seconds: float) -> None:
    assert protocol.retry_after(text, now) == seconds


KEPT = CutGeneration(1, "Once upon", 2)


def chat_at(engine: str, **fields: Any) -> AskItem:
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
    request, body = rest_of(chat_at(LLAMA_CPP, stop=["END"], top_k=5), template="<user>Hello<assistant>")
    assert request.path == "/completions"
    assert (body["prompt"], body["max_tokens"]) == ("<user>Hello<assistant>Once upon", 8)
    assert (body["stop"], body["top_k"], body["timings_per_token"], "messages" in body) == (["END"], 5, True, False)


def test_vllm_continues_the_assistants_message() -> None:
    request, body = rest_of(chat_at(VLLM, min_tokens=5))
    assert request.path == "/chat/completions"
    assert body["messages"] == [*HELLO["messages"], {"role": "assistant", "content": "Once upon"}]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert (body["max_tokens"], body["min_tokens"]) == (8, 3)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    _, body = rest_of(chat_at(VLLM, max_tokens=None, max_completion_tokens=5))
    assert (body["max_tokens"], "max_completion_tokens" in body) == (3, False), "of a limit under its newer name"


def test_any_engine_continues_a_prompt() -> None:
    request, body = rest_of(prompt())
    assert (request.path, body["prompt"], body["max_tokens"]) == ("/completions", "TellOnce upon", 8)


@pytest.mark.cases("fields")
def test_an_answer_of_more_than_text_does_not_go_on(fields: dict[str, Any]) -> None:
    item = chat_at(LLAMA_CPP, **fields)
    assert (item.plain, item.go_on) == (False, None)


@pytest.mark.parametrize(("engine", "goes_on"), [(LLAMA_CPP, True), (VLLM, False)])
def test_penalties_of_what_was_written_carry_over_only_where_a_prompt_counts_too(engine: str, goes_on: bool) -> None:
    assert (chat_at(engine, presence_penalty=0.5).go_on is not None) is goes_on


def test_the_answer_and_its_usage_are_those_of_an_undisturbed_one() -> None:
    request, _ = rest_of(chat_at(VLLM))
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
    item = chat_at(LLAMA_CPP)
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
    assert item.ask.path == "mood"
    assert b"a calm flight" in item.ask.body
    assert b"\x81\xa4text\x91" in item.ask.body


def test_an_array_keeps_its_type_and_gets_its_batch_axis() -> None:
    spec = TensorSpec(name="a", datatype="FP32", shape=(2, -1), batch_axis=1)
    sent = batched(spec, np.array([1.5, 2.5], np.float32))
    assert (sent["shape"], sent["datatype"]) == ([2, 1], "FP32")
    assert only_row(spec, sent).tolist() == [1.5, 2.5]
