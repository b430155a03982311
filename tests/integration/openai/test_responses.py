"""The Responses API by the stock SDK, at real routers, a worker and Valkey; the engine behind them is scripted."""

import signal
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from tests.openai_fleet import QUEUES, Caller, OpenAIFleet, openai_fleet, sdk
from tests.routing import HTTP, eventually, router_process

ADD: Any = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}
QUICK = QUEUES.replace("limits: {{", "limits: {{responses: 3, keep_response: 600, ")


def ended(client: openai.OpenAI, name: str) -> Response:
    def look() -> Response | None:
        found = client.responses.retrieve(name)
        return found if found.status not in ("queued", "in_progress") else None

    found: Response = eventually(look)
    return found


@pytest.fixture
def respond(call: Caller) -> Caller:
    """Makes a response to an input."""
    return lambda asked, **fields: call("responses.create", model="talk", input=asked, **fields)


def test_a_text_is_answered_by_a_message_and_stored(call: Caller, respond: Caller, fleet: OpenAIFleet) -> None:
    answer = respond("Hello dear world", instructions="Be kind.", max_output_tokens=9)

    assert type(answer) is Response
    assert answer.usage is not None
    assert answer.model_extra is not None
    assert (answer.output_text, answer.status, answer.model) == ("Hello dear world ", "completed", "talk:1")
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (3, 3, 6)
    assert answer.model_extra["taxiway"]["job"] == answer._request_id == answer.id.removeprefix("resp_")
    asked = fleet.engine.chats[-1]
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    assert asked["max_completion_tokens"] == 9
    again = call("responses.retrieve", answer.id)
    assert (again.output, again.usage, again.instructions) == (answer.output, answer.usage, "Be kind.")


def test_a_conversation_goes_on_after_the_previous_response(call: Caller, respond: Caller, fleet: OpenAIFleet) -> None:
    first = respond("one two", instructions="Count.")
    second = respond([{"role": "user", "content": "three"}], previous_response_id=first.id)
    third = respond("four", previous_response_id=second.id, store=False)

    assert third.output_text == "four "
    said = [(message["role"], message["content"]) for message in fleet.engine.chats[-1]["messages"]]
    assert said == [
        ("user", "one two"),
        ("assistant", "one two "),
        ("user", "three"),
        ("assistant", "three "),
        ("user", "four"),
    ]
    with pytest.raises(openai.NotFoundError):
        call("responses.retrieve", third.id)
    for wrong in (third.id, "resp_none"):
        with pytest.raises(openai.BadRequestError) as caught:
            respond("five", previous_response_id=wrong)
        assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_a_stream_has_openais_events_with_numbers_that_grow_by_what_is_sent(call: Caller, respond: Caller) -> None:
    events = respond("one two", stream=True)

    assert list(dict.fromkeys(event.type.removeprefix("response.") for event in events)) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events][:4] == [0, 1, 2, 3]
    assert events[-1].sequence_number == len(events) - 1 + len("one two ") - sum(
        hasattr(one, "delta") for one in events
    )
    last = events[-1].response
    assert (last.output_text, last.usage.output_tokens) == ("one two ", 2)
    assert call("responses.retrieve", last.id).output == last.output


def test_the_sdks_own_stream_puts_text_and_calls_together(client: openai.OpenAI) -> None:
    said = "think=hm one two call=add:{} finish=tool_calls"
    with client.responses.stream(model="talk", input=said, tools=[ADD]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()

    assert "response.function_call_arguments.delta" in kinds
    assert final.output_text == "one two "
    assert sorted(item.type for item in final.output) == ["function_call", "message", "reasoning"]


def test_a_reader_that_comes_back_to_a_response_in_the_background_gets_the_rest_as_it_comes(
    client: openai.OpenAI,
) -> None:
    begun = client.responses.create(model="talk", input="wait=1 a b c d", background=True, stream=True)
    seen: list[Any] = []
    with begun as stream:
        for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                break
    rest = list(client.responses.retrieve(seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number))
    text = "".join(event.delta for event in (*seen, *rest) if event.type == "response.output_text.delta")
    assert text == "a b c d "
    assert sum(event.type == "response.output_text.delta" for event in rest) > 1
    assert rest[-1].type == "response.completed"
    with client.responses.stream(response_id=seen[0].response.id, starting_after=1) as again:
        assert again.get_final_response().output_text == "a b c d "


def test_a_response_in_the_background_is_queued_and_then_there(
    call: Caller, respond: Caller, client: openai.OpenAI
) -> None:
    begun = respond("wait=0.2 one two", background=True, metadata={"for": "tests"})

    assert (begun.status, begun.output, begun.background) == ("queued", [], True)
    found = ended(client, begun.id)
    assert (found.status, found.output_text, found.metadata) == ("completed", "one two ", {"for": "tests"})
    assert found.service_tier == "flex"
    assert call("responses.cancel", begun.id).status == "completed"


def test_a_deleted_response_is_gone_and_a_running_one_is_cancelled(
    call: Caller, respond: Caller, fleet: OpenAIFleet
) -> None:
    text = f"deleted {id(call)} stall"
    done = respond("one")
    running = respond(text, background=True)
    eventually(lambda: text in fleet.engine.begun)

    for name in (done.id, running.id):
        call("responses.delete", name)
        for gone in ("retrieve", "delete", "cancel", "input_items.list"):
            with pytest.raises(openai.NotFoundError):
                call(f"responses.{gone}", name)
    eventually(lambda: text in fleet.engine.aborts)


def test_the_probabilities_of_tokens_are_included_if_asked(respond: Caller) -> None:
    answer = respond("one two", include=["message.output_text.logprobs"], top_logprobs=1)
    assert [one.token for one in answer.output[0].content[0].logprobs] == ["one ", "two "]


def test_the_input_is_listed_in_pages(call: Caller, respond: Caller) -> None:
    texts = ["a", "b", "c"]
    made = respond([{"role": "user", "content": text} for text in texts])

    latest_first = call("responses.input_items.list", made.id, limit=2)  # the SDK reads on, page by page
    assert [item.content[0].text for item in latest_first] == ["c", "b", "a"]
    assert [item.content[0].text for item in call("responses.input_items.list", made.id, order="asc")] == texts
    assert len({item.id for item in latest_first}) == 3


def test_an_answer_that_was_cut_is_incomplete(respond: Caller) -> None:
    answer = respond("one finish=length")

    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert respond("one finish=length", stream=True)[-1].type == "response.incomplete"


def test_a_job_that_fails_is_a_failed_response_with_the_reason(respond: Caller, client: openai.OpenAI) -> None:
    begun = respond("status=400 no such tool", background=True)
    failed: Any = ended(client, begun.id)

    assert (failed.status, failed.error.code) == ("failed", "invalid_prompt")
    assert "no such tool" in failed.error.message
    with pytest.raises(openai.BadRequestError):
        respond("status=400 no such tool")
    last = respond("status=400 no such tool", stream=True)[-1]
    assert (last.type, last.response.status, last.response.error.code) == (
        "response.failed",
        "failed",
        "invalid_prompt",
    )


@pytest.mark.cases("fields, param, code")
def test_what_is_wrong_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str | None, code: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(**{"model": "talk", **fields})

    assert (caught.value.param, caught.value.code) == (param, code)


def test_responses_outlive_the_router_that_began_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    """It is killed while one of them runs: another router ends that, though nobody asks for it."""
    with openai_fleet(tmp_path_factory.mktemp("killed"), queues=QUICK) as fleet:
        with sdk(fleet.url) as client:
            done = client.responses.create(model="talk", input="one")
            running = client.responses.create(model="talk", input="wait=0.5 a b c", background=True)
        fleet.router.process.send_signal(signal.SIGKILL)
        fleet.router.process.wait()
        with router_process(fleet.settings) as router, sdk(f"{router.http}/v1") as client:
            eventually(lambda: HTTP.get(f"{router.http}/v2/health/ready").is_success)
            assert client.responses.retrieve(done.id).output_text == "one "
            assert ended(client, running.id).output_text == "a b c "
