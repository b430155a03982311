"""How an answer of plain text goes on after it was cut, on each engine, without one."""

import json
from typing import Any

import pytest

from taxiway.contract.generation import CutGeneration
from tests.unit.workers.endpoints.test_endpoint_protocols import CHAT, HELLO, RAW, event, piece
from workers.endpoints import openai
from workers.endpoints.plain_text import LLAMA_CPP, TEMPLATE, VLLM
from workers.endpoints.protocol import AskItem, EngineRequest, ServedModel

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
