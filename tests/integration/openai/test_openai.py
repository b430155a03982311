"""OpenAI's API by the stock SDK, at a real router, worker and Valkey; the engine behind them is scripted."""

import contextlib
import json
import time
from http.client import HTTPConnection
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

import taxiway
from tests.builders import a_chat
from tests.openai_fleet import SECOND, Caller, OpenAIFleet
from tests.routing import eventually

HELLO: Any = [{"role": "user", "content": "Hello dear world"}]


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_a_chat_is_answered_in_the_sdks_own_type_with_the_run_report(call: Caller) -> None:
    answer = call("chat.completions.create", model="talk", messages=HELLO)

    assert answer.usage is not None
    assert answer.model_extra is not None
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello dear world ", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 6)
    assert (answer.model, answer.service_tier, answer.system_fingerprint) == ("talk:1", "default", "engine")
    report = answer.model_extra["taxiway"]
    assert (report["hardware_class"], report["device"], report["job"]) == (
        "cpu.batch",
        "endpoint:0",
        answer._request_id,
    )


def test_a_streamed_chat_comes_in_chunks_that_end_with_usage(call: Caller) -> None:
    chunks = call(
        "chat.completions.create", model="talk", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )

    assert text_of(chunks) == "Hello dear world "
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["stop"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)
    assert chunks[-2].model_extra["taxiway"]["hardware_class"] == "cpu.batch"
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_says_what_the_engine_had_cached_and_what_it_reasoned(
    call: Caller, fleet: OpenAIFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1}}
    monkeypatch.setattr(fleet.engine, "usage", details)
    chat = {"model": "talk", "messages": HELLO}
    whole = call("chat.completions.create", **chat)
    *_, last = call("chat.completions.create", **chat, stream=True, stream_options={"include_usage": True})
    response = call("responses.create", model="talk", input="Hello dear world")
    for usage in (whole.usage, last.usage):
        assert usage.prompt_tokens_details.cached_tokens == 2
        assert usage.completion_tokens_details.reasoning_tokens == 1
    assert response.usage.input_tokens_details.cached_tokens == 2
    assert response.usage.output_tokens_details.reasoning_tokens == 1


def test_several_choices_are_rows_of_one_job(call: Caller, fleet: OpenAIFleet) -> None:
    before = len(fleet.engine.chats)
    answer = call("chat.completions.create", model="talk", messages=HELLO, n=3, seed=5)

    assert [(one.index, one.message.content) for one in answer.choices] == [
        (index, "Hello dear world ") for index in range(3)
    ]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 9)
    asked = fleet.engine.chats[before:]
    assert sorted(one["seed"] for one in asked) == [5, 6, 7]
    assert not any({"n", "service_tier"} & one.keys() for one in asked)


TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLING: Any = [{"role": "user", "content": 'think=hm think=so Well call=add:{"a":1} call=sub:{} finish=tool_calls'}]


def test_a_call_comes_before_its_arguments_are_complete(client: openai.OpenAI, fleet: OpenAIFleet) -> None:
    messages: Any = [{"role": "user", "content": "wait=3600 Well call=add:{} more"}]
    with client.chat.completions.create(model="talk", messages=messages, tools=TOOLS, stream=True) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.tool_calls:
                break
        else:
            raise AssertionError("the stream ended")


def together(client: openai.OpenAI, **fields: Any) -> tuple[set[str], Any]:
    """Streams a chat by the SDK's accumulator; the types of its events, and what it puts together."""
    with client.chat.completions.stream(**fields) as stream:
        return {event.type for event in stream}, stream.get_final_completion()


def test_the_sdks_accumulator_puts_a_stream_together(client: openai.OpenAI) -> None:
    asked: Any = {"model": "talk", "messages": CALLING, "tools": TOOLS, "logprobs": True}
    kinds, final = together(client, **asked)
    whole = client.chat.completions.create(**asked)

    assert {"content.delta", "logprobs.content.delta", "tool_calls.function.arguments.delta"} <= kinds
    message, expected = final.choices[0].message, whole.choices[0].message
    assert message.content == expected.content == "Well "
    assert [(one.id, one.function.name, one.function.arguments) for one in message.tool_calls or ()] == [
        (one.id, one.function.name, one.function.arguments) for one in expected.tool_calls or ()
    ]
    assert (message.model_extra or {})["reasoning_content"] == "hmso"
    assert final.choices[0].logprobs == whole.choices[0].logprobs
    assert [one.token for one in whole.choices[0].logprobs.content] == ["Well "]
    assert final.choices[0].finish_reason == "tool_calls"


def test_choices_of_prompts_are_streamed_by_their_index(call: Caller) -> None:
    asked = {"model": "tale", "prompt": ["one two", "three"], "n": 2, "max_tokens": 9}
    chunks = call("completions.create", **asked, stream=True, stream_options={"include_usage": True})

    said = dict.fromkeys(range(4), "")
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.text
    assert list(said.values()) == ["one two ", "one two ", "three ", "three "]
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == [0, 1, 2, 3]
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (6, 6)


def test_embeddings_are_one_job_with_a_row_for_each_text(call: Caller) -> None:
    texts = ["a", "bb", "ccc"]
    plain = call("embeddings.create", model="vector", input=texts, encoding_format="float")
    packed = call("embeddings.create", model="vector", input=texts)  # the SDK asks for base64 and unpacks it

    assert [one.embedding for one in plain.data] == [one.embedding for one in packed.data] == [[1, 1], [2, 1], [3, 1]]
    assert [one.index for one in plain.data] == [0, 1, 2]
    assert plain.usage.total_tokens > 0
    single = call("embeddings.create", model="vector", input="four", encoding_format="float", dimensions=1)
    assert single.data[0].embedding == [1.0]


def test_each_model_that_the_calls_can_use_is_listed_once_and_answers_by_every_name(call: Caller) -> None:
    models = call("models.list")
    assert sorted(one.id for one in models) == sorted(("talk", "tale", "vector", SECOND))
    assert all(0 < time.time() - one.created < 3600 for one in models)
    assert call("models.retrieve", model="talk@stable").model_extra["taxiway"]["model"] == "talk:1"


CHAT = "chat.completions.create"


LARGE = [
    (CHAT, a_chat("far too long " * 3_500, model="talk"), 400, "messages", "context_length_exceeded"),
    (CHAT, a_chat("x" * 70_000, model="talk"), 413, None, "too_large"),
]
CLASSES = {400: openai.BadRequestError, 404: openai.NotFoundError, 422: openai.UnprocessableEntityError}


@pytest.mark.cases("name, fields, status, param, code", LARGE)
def test_an_error_is_the_sdks_own_class_with_param_and_code(
    call: Caller, name: str, fields: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    with pytest.raises(CLASSES.get(status, openai.APIStatusError)) as caught:
        call(name, **fields)

    assert (caught.value.status_code, caught.value.param, caught.value.code) == (status, param, code)
    assert caught.value.message
    assert caught.value.type in ("invalid_request_error", "server_error")


def test_paths_and_methods_that_are_not_there_are_refused_by_openais_form(http: httpx.Client) -> None:
    for answer, status in [(http.get("/v1/assistants"), 404), (http.get("/v1/chat/completions"), 405)]:
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    assert http.get("/v1/scaling/none").json()["code"] == "request_error"


def test_headers_are_terms_and_the_answers_headers_the_report(client: openai.OpenAI, http: httpx.Client) -> None:
    terms = {"X-Taxiway-Deadline": "17", "X-Taxiway-Budget": "0.5", "X-Taxiway-Locality": "lab"}
    raw = client.chat.completions.with_raw_response.create(model="talk", messages=HELLO, extra_headers=terms)
    streamed = client.chat.completions.with_raw_response.create(model="talk", messages=HELLO, stream=True)

    job = raw.headers["x-request-id"]
    record = http.get(f"/v2/jobs/{job}").json()
    assert record["deadline_at"] - record["accepted"] == pytest.approx(17, abs=0.1)
    assert (raw.headers["x-taxiway-class"], raw.headers["x-taxiway-variant"]) == ("cpu.batch", "engine")
    assert raw.headers["x-taxiway-reason"] and float(raw.headers["x-taxiway-cost"]) > 0
    assert streamed.headers["x-taxiway-class"] == "cpu.batch"
    assert http.get(f"/v2/jobs/{streamed.headers['x-request-id']}").json()["model"] == "talk:1"
    assert text_of(list(streamed.parse())) == "Hello dear world "


def test_calls_under_one_key_are_one_job_and_another_call_is_refused(client: openai.OpenAI, fleet: OpenAIFleet) -> None:
    def ask(text: str) -> str:
        messages: Any = [{"role": "user", "content": text}]
        headers = {"Idempotency-Key": "k1"}
        return str(client.chat.completions.create(model="talk", messages=messages, extra_headers=headers)._request_id)

    before = len(fleet.engine.chats)
    assert ask("only once") == ask("only once")
    assert len(fleet.engine.chats) == before + 1
    with taxiway.Client(fleet.router.http) as other:  # it is an ordinary job at the other interfaces
        assert other.job(ask("only once")).result(timeout=60).outputs["text"] == "only once "
    with pytest.raises(openai.ConflictError) as caught:
        ask("something else")
    assert caught.value.code == "idempotency_key_reused"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_deadline_that_passes_is_an_error_that_is_not_retried(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "late stall"}]
    for stream in (False, True):
        with pytest.raises(openai.APIError) as caught:
            found: Any = client.chat.completions.create(
                model="talk", messages=messages, stream=stream, extra_headers={"X-Taxiway-Deadline": "1"}
            )
            list(found)
        assert caught.value.code == "deadline_exceeded"
        if isinstance(caught.value, openai.APIStatusError):
            assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_job(fleet: OpenAIFleet, http: httpx.Client, stream: bool) -> None:
    prompt = f"gone {stream} stall"
    body = a_chat(prompt, model="talk", stream=stream)
    with contextlib.closing(HTTPConnection(http.base_url.host, http.base_url.port)) as leaving:
        leaving.request("POST", "/v1/chat/completions", json.dumps(body))
        eventually(lambda: prompt in fleet.engine.begun)
    eventually(lambda: prompt in fleet.engine.aborts)


def test_a_stream_ends_with_done_and_says_so_in_its_type(http: httpx.Client) -> None:
    body = {"model": "talk", "messages": HELLO, "stream": True}
    answer = http.post("/v1/chat/completions", json=body)

    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line for line in answer.text.split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event[6:]) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any(chunk.get("usage") for chunk in chunks), "it was not asked for"


def test_a_waiting_stream_is_kept_alive_by_comments(fleet: OpenAIFleet, http: httpx.Client) -> None:
    prompts = [f"wait=1 {n}{' slot' * 40}" for n in range(4)]
    body = {"model": "talk", "stream": True}
    with contextlib.ExitStack() as held:
        for prompt in prompts:
            messages = [{"role": "user", "content": prompt}]
            held.enter_context(http.stream("POST", "/v1/chat/completions", json={**body, "messages": messages}))
        eventually(lambda: {*prompts} <= fleet.engine.begun)
        begun = time.monotonic()
        with http.stream("POST", "/v1/chat/completions", json={**body, "messages": HELLO}) as waiting:
            first = next(waiting.iter_text())
    assert first.startswith(":")
    assert time.monotonic() - begun < 30
