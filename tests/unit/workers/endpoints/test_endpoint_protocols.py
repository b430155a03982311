"""The protocols of endpoints: what is asked for, and how answers are read, without a server."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.model import Model
from taxiway.contract.job import Tokens
from taxiway.contract.tensors import HEADER, SIZE, bytes_part
from taxiway.errors import InvalidRequestError
from tests.narrowing import present
from tests.unit.tasks.test_catalogue import model as described
from workers.endpoints import oip, openai, protocol
from workers.port import Row


def engine_model(
    runtime: str = "openai", *, texts: tuple[str, ...] = ("text",), entry: str = "", **fields: Any
) -> Model:
    """A model on an endpoint with inputs of text."""
    variant = {"runtime": runtime, "profiles": {"endpoint": {"base": 0.1, "slope": 0}}}
    named = [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in texts]
    variants = {"onnx": variant | ({"entry": entry} if entry else {})}
    return described(**({"inputs": named, "variants": variants} | fields))


TOKENS = {"max_tokens": {"type": "integer", "default": 64}}
CHAT = engine_model(pipeline="chat", texts=("request",), parameters=TOKENS)
PROMPT = engine_model(pipeline="generation", texts=("prompt",), parameters=TOKENS)
RAW = engine_model(pipeline="generation", texts=("prompt",), parameters=TOKENS, entry="completions")
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
