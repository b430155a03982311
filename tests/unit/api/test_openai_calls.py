"""OpenAI's calls as values: what a body asks for, what its terms are, and how errors and streams are worded."""

import asyncio
import codecs
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api.objects.batches import MOST_LINES, lines_of
from api.openai import requests
from api.openai.answers import AnswerHead, ChatWriter, MessagePart, StreamProgress, embeddings, text_logprobs, usage_of
from api.openai.responses.events import ResponseWriter, replay
from api.openai.responses.response import ResponseCall, begun, input_items, messages_of, response_fields
from api.openai_errors import content, param_of
from api.terms import add_terms
from tasks.models.model import parse_model
from tasks.queues.limits import Limits
from tasks.topology import Service, Topology, parse_topology
from taxiway import errors
from taxiway.contract.job import Result
from taxiway.contract.request import parse_terms
from taxiway.contract.stream import TEXTS, OtherMessageError, Piece, SentMessage
from tests.builders import ENGINE_MODELS, a_report
from tests.unit.strategies import json_values
from tests.unit.tasks.test_topology import TEXT

TALK = parse_model(ENGINE_MODELS["talk"], "model.yaml")
VECTOR = parse_model(ENGINE_MODELS["vector"], "model.yaml")
REPORT = a_report()
CALLED = st.fixed_dictionaries(
    {"index": st.integers(0, 1)},
    optional={"id": st.sampled_from("ab"), "function": st.fixed_dictionaries({"arguments": st.text(max_size=3)})},
)
DELTAS = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.text(max_size=3) for name in TEXTS},
        "tool_calls": st.lists(CALLED, max_size=2),
        "logprobs": st.lists(st.integers(), max_size=2),
    },
)
TALKS = {"model": "talk", "messages": [{"role": "user", "content": "x"}]}
FIELDS = ("model", "messages", "prompt", "input", "n", "stream", "stop", "logprobs", "stream_options", "dimensions")


def topology(**tiers: Any) -> Topology:
    whole = parse_topology(TEXT)
    services = {"plain": Service(deadline=5)} | {name: Service(deadline=9, tier=tier) for name, tier in tiers.items()}
    hardware = {name: msgspec.structs.replace(one, reserve_for=None) for name, one in whole.hardware.items()}
    return msgspec.structs.replace(whole, hardware=hardware, service=services, default_service="plain")


BODIES = st.dictionaries(st.sampled_from(FIELDS), json_values) | json_values


@given(content=st.binary(max_size=40) | BODIES.map(lambda value: json.dumps(value).encode()))
@pytest.mark.parametrize("kind", [requests.ChatCall, requests.CompletionCall, requests.EmbeddingsCall, ResponseCall])
def test_a_body_is_a_call_or_is_refused_by_the_name_of_its_field(kind: Any, content: bytes) -> None:
    try:
        asked = requests.read_call(content, kind, Limits())
    except errors.InvalidRequestError as error:
        assert error.details.get("field") or not content.startswith(b"{")
    except errors.RequestTooLargeError as error:
        assert error.status == 413
    else:
        assert asked.call.model == json.loads(content)["model"]


def test_more_choices_than_a_model_takes_rows_are_refused_by_their_name() -> None:
    few = msgspec.structs.replace(TALK, max_rows=2)
    asked = requests.read_call(json.dumps({**TALKS, "n": 3}).encode(), requests.ChatCall, Limits())
    with pytest.raises(errors.InvalidRequestError, match="n: expected at most 2 choices of talk:1") as caught:
        requests.chat_fields(asked, few)
    assert param_of(caught.value, "/v1/chat/completions") == "n"


NAME, OVER = "u" * 513, 2**31 + 1
ASKS: dict[str, Any] = {"model": "m", "input": "x"}
BEYOND: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (requests.ChatCall, TALKS, {"max_tokens": 10**400, "max_completion_tokens": OVER, "n": 10**400, "seed": 2**63}),
    (requests.ChatCall, TALKS, {"user": NAME, "safety_identifier": NAME}),
    (requests.CompletionCall, {"model": "tale", "prompt": "x"}, {"max_tokens": 10**400}),
    (requests.EmbeddingsCall, ASKS, {"dimensions": OVER}),
    (ResponseCall, ASKS, {"max_output_tokens": OVER, "prompt_cache_key": NAME}),
]


@pytest.mark.parametrize(("kind", "asks", "beyond"), BEYOND)
def test_what_is_beyond_its_bound_is_refused_by_name(kind: Any, asks: dict[str, Any], beyond: dict[str, Any]) -> None:
    for name, value in beyond.items():
        with pytest.raises(errors.InvalidRequestError) as caught:
            requests.read_call(json.dumps({**asks, name: value}).encode(), kind, Limits())
        assert caught.value.details["field"] == name
        assert len(caught.value.message) < 300


def test_choices_that_would_together_exceed_a_payload_are_refused_before_they_are_made() -> None:
    body = json.dumps({**TALKS, "metadata": {"x": "x" * 300_000}, "n": 64}).encode()
    with pytest.raises(
        errors.RequestTooLargeError, match=f"payload: expected at most 16777216 bytes, got {64 * len(body)}"
    ):
        requests.read_call(body, requests.ChatCall, Limits())


def test_a_tier_selects_the_service_that_has_it_and_auto_the_default_one() -> None:
    rules = topology(fast="priority", slow="flex")
    assert [requests.service_of(tier, rules) for tier in (None, "auto", "default", "flex", "priority")] == [
        "plain",
        "plain",
        "plain",
        "slow",
        "fast",
    ]
    assert requests.service_of("auto", topology(chat="default")) == "chat"
    assert [requests.tier_of(name, rules) for name in ("plain", "slow")] == ["default", "flex"]
    for unknown in ("scale", "flex", ""):
        with pytest.raises(errors.InvalidRequestError, match="service_tier: expected one of"):
            requests.service_of(unknown, topology())


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "", "1e999", "1_0", "٣"])
def test_a_deadline_that_is_no_number_above_0_is_refused_by_its_header(text: str) -> None:
    terms: dict[str, Any] = {}
    with pytest.raises(errors.InvalidRequestError) as caught:
        add_terms([(b"x-taxiway-deadline", text.encode())], terms)
        parse_terms(terms)
    assert param_of(caught.value, "/v1/completions") == "X-Taxiway-Deadline"


@pytest.mark.cases("path, field, param")
def test_an_error_names_the_parameter_as_its_caller_knows_it(path: str, field: str, param: str | None) -> None:
    error = errors.InvalidRequestError(f"{field}: expected this", field=field)
    said = json.loads(content(error, path))["error"]
    assert said["param"] == param
    assert said["message"] == f"{param or field}: expected this"


@pytest.mark.cases("kind, text, details, path, worded")
def test_an_error_is_worded_as_openai_words_it(
    kind: type[errors.TaxiwayError], text: str, details: dict[str, Any], path: str, worded: dict[str, Any]
) -> None:
    assert worded.items() <= json.loads(content(kind(text, **details), path))["error"].items()


def result(**outputs: Any) -> Result:
    return Result(model="talk:1", outputs=outputs, report=REPORT)


def said(*pieces: Piece, whole: Any) -> list[Any]:
    """The parts of a job whose stream has the pieces, and whose result has the message or text `whole`."""
    answers = StreamProgress()
    parts = [*answers.take_all((f"{n}-0", piece) for n, piece in enumerate(pieces))]
    ended = {"message": whole} if isinstance(whole, dict) else {"text": whole}
    return [*(part.delta for part in parts), *(part.delta for part in answers.end(result(**ended)))]


def text(*parts: str) -> list[dict[str, str]]:
    return [{"content": part} for part in parts]


def test_text_is_sent_once_whatever_happens_on_the_way() -> None:
    ab, c = Piece(1, 0, "ab"), Piece(1, 2, "c")
    assert said(ab, c, whole="abc") == text("ab", "c")
    assert said(ab, c, c, Piece(1, 2, "cd"), whole="abcd") == text("ab", "c", "d")
    assert said(ab, Piece(2, 0, "ab"), Piece(2, 2, "c"), whole="abc") == text("ab", "c")
    assert said(ab, Piece(2, 0, "abc"), c, Piece(2, 3, "d"), whole="abcd") == text("ab", "c", "d")
    assert said(ab, Piece(1, 5, "f"), whole="abcdef") == text("ab", "cdef")
    assert said(whole="abc") == said(whole=["abc"]) == text("abc")
    assert said(Piece(3, 0, "ab"), ab, whole="abc") == text("ab", "c")


@pytest.mark.cases("stated, whole")
def test_an_answer_that_begins_otherwise_after_a_restart_is_an_error(stated: dict[str, Any], whole: Any) -> None:
    with pytest.raises(errors.DeviceFaultError, match="restarted"):
        said(Piece(1, 0, **stated), Piece(2, 0, "xy"), whole=whole)


@given(deltas=st.lists(DELTAS, max_size=8), stated=st.integers(0, 8))
def test_the_rest_of_a_message_makes_it_whole(deltas: list[dict[str, Any]], stated: int) -> None:
    begun, whole, indices = SentMessage(), SentMessage(), dict[int, int]()
    for place, delta in enumerate(deltas):
        for call in delta.get("tool_calls", ()):  # they begin in order
            call["index"] = indices.setdefault(call["index"], len(indices))
        whole.add(delta)
        if place < stated:
            begun.add(delta)
    plain = {name: whole.text(name) for name in TEXTS}
    message = {**plain, "tool_calls": whole.calls, "logprobs": {"content": whole.logprobs}}
    try:
        rest = begun.rest(message)
    except OtherMessageError:
        assert [call["id"] for call in begun.calls] != [call["id"] for call in whole.calls][: len(begun.calls)]
        return
    begun.add(rest)
    assert {name: begun.text(name) for name in TEXTS} == plain
    assert (begun.calls, begun.logprobs) == (whole.calls, whole.logprobs)
    assert begun.rest(message) == {}


def test_the_prompts_tokens_of_several_choices_count_once_and_their_parts_are_never_more_than_these() -> None:
    one = {"prompt_tokens": 3, "completion_tokens": 2}
    assert msgspec.to_builtins(usage_of(result(usage=[one, one]))) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
    }
    assert usage_of(result(usage=None)) is usage_of(result(text="x")) is None
    parts = one | {"prompt_tokens_details": {"cached_tokens": 2, "odd": -1, "text": "x", "flag": True}}
    usage = usage_of(result(usage=[parts, {**one, "prompt_tokens_details": {"cached_tokens": 10**30}}, {}]), 1)
    assert usage is not None
    assert (usage.prompt_tokens_details, usage.completion_tokens_details) == ({"cached_tokens": 6}, {})


@given(rows=st.lists(st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 2), min_size=1, max_size=5), packed=st.booleans())
def test_fewer_dimensions_are_the_first_ones_at_unit_length(rows: list[tuple[float, float]], packed: bool) -> None:
    found = Result(model="vector:1", outputs={"embedding": [list(row) for row in rows]}, report=REPORT)
    answer = embeddings(
        AnswerHead("j", "default", 0), found, model=VECTOR, texts=["a"] * len(rows), packed=packed, dimensions=1
    )
    assert [one.index for one in answer.data] == [*range(len(rows))]
    if not packed:
        assert [one.embedding for one in answer.data] == [[float(np.sign(np.float32(first)))] for first, _ in rows]


ODD = st.sampled_from([None, True, 3, "", "x", [], ["x"], {}, {"type": "x"}])
ITEMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning"]) | ODD,
            "role": st.sampled_from(["user", "assistant", "developer"]) | ODD,
            "content": st.text(max_size=8)
            | st.lists(
                st.fixed_dictionaries(
                    {"type": st.sampled_from(["input_text", "input_image"]) | ODD},
                    optional={"text": st.text(max_size=8) | ODD, "image_url": ODD},
                ),
                max_size=3,
            )
            | ODD,
            **dict.fromkeys(("id", "call_id", "name", "arguments", "output"), st.text(max_size=8) | ODD),
        },
    ),
    max_size=4,
)


SHOWN = {"type": "input_image", "image_url": "u"}
TURNS = [
    {"role": "assistant", "content": "x"},
    {"type": "function_call_output", "call_id": "c", "output": "x"},
    {"role": "user", "content": [{"type": "refusal", "refusal": "x"}, SHOWN]},
]


@given(items=ITEMS)
@example(items=TURNS)
@example(items=[{"role": "user", "content": [{"type": "sound"}]}])
def test_items_of_any_form_are_messages_or_are_refused_by_name(items: list[dict[str, Any]]) -> None:
    listed = input_items(ResponseCall(model="talk", input=items), "j")
    assert all(isinstance(item["id"], str) and item["id"] for item in listed)
    try:
        messages = messages_of(listed)
    except errors.InvalidRequestError as error:
        assert error.details["field"].startswith("input[")
    else:
        assert len(messages) <= len(items)
        assert all(message["role"] in ("user", "assistant", "system", "tool") for message in messages)


@pytest.mark.cases("body, chat")
def test_a_response_asks_its_model_for_what_a_chat_would(body: dict[str, Any], chat: dict[str, Any]) -> None:
    asked = requests.read_call(json.dumps(body).encode(), ResponseCall, Limits())

    assert [*response_fields(asked, TALK)["inputs"].values()] == [chat]


def events_in(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(event.partition(b"\ndata: ")[2]) for event in raw.split(b"\n\n")[:-1]]


def told_response(pieces: list[str], calls: int, cut: int) -> tuple[Any, bytes]:
    """A response, and its events where `cut` of its pieces came before its result."""
    asked = requests.read_call(b'{"model": "talk", "input": "x"}', ResponseCall, Limits())
    called = [{"id": f"c{n}", "function": {"name": "f", "arguments": "{}"}} for n in range(calls)]
    message = {"role": "assistant", "content": "".join(pieces), "tool_calls": called, "reasoning_content": "hm"}
    writer, answers = ResponseWriter(begun(asked.call, TALK, AnswerHead("j", "default", 1))), StreamProgress()
    come = [Piece(1, 0, beside=[{"reasoning_content": "hm"}])]
    come += [Piece(1, len("".join(pieces[:n])), piece, sent=1) for n, piece in enumerate(pieces)]
    done = result(message=message, **{"finish-reason": "stop"})
    parts = [*answers.take_all((f"{n}-0", piece) for n, piece in enumerate(come[:cut])), *answers.end(done)]
    raw = writer.begin() + b"".join(map(writer.part, parts))
    response = writer.finish(done, 2)
    return response, raw + writer.ending(done)


def characters_in(raw: bytes) -> list[tuple[int, str, str]]:
    """What events tell, with each character of a delta by itself: the number, the event's type and the character."""
    found = []
    for event in events_in(raw):
        number, delta = event["sequence_number"], event.get("delta")
        if delta is None:
            found.append((number, event["type"], ""))
        else:
            first = number - len(delta) + 1
            found += [(first + place, event["type"], character) for place, character in enumerate(delta)]
    return found


PIECES = st.lists(st.text(min_size=1, max_size=5), max_size=5)


@given(pieces=PIECES, calls=st.integers(0, 2), cut=st.integers(0, 6))
def test_the_events_of_a_response_add_up_to_it(pieces: list[str], calls: int, cut: int) -> None:
    response, raw = told_response(pieces, calls, cut)
    events = events_in(raw)
    stated = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert stated == "".join(pieces)
    assert items == events[-1]["response"]["output"] == response.output
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.added"] == [
        *range(len(items))
    ]
    assert [number for number, _, _ in characters_in(raw)] == [*range(len(characters_in(raw)))]


@given(pieces=PIECES, calls=st.integers(0, 2), cut=st.integers(0, 6), after=st.integers(-1, 60))
def test_a_reader_that_comes_back_gets_the_rest(pieces: list[str], calls: int, cut: int, after: int) -> None:
    response, raw = told_response(pieces, calls, cut)
    whole = characters_in(raw)
    end = (max(whole[-1][0], after + 1), *whole[-1][1:])
    assert characters_in(replay(response, after)) == [*(one for one in whole[:-1] if one[0] > after), end]


def test_a_completion_has_the_probabilities_of_its_tokens_in_lists() -> None:
    likely = [{"token": "x", "logprob": -2.0}]
    stated = [
        {"token": "ab", "logprob": -0.5, "top_logprobs": likely},
        {"token": "c", "logprob": -1.0, "top_logprobs": []},
    ]
    assert msgspec.to_builtins(text_logprobs(stated, 3)) == {
        "tokens": ["ab", "c"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"x": -2.0, "ab": -0.5}, {"c": -1.0}],
        "text_offset": [3, 5],
    }
    assert text_logprobs([], 3) is text_logprobs(None) is None


@given(st.permutations(range(4)))
def test_choices_begin_in_their_order_whichever_is_sent_first(rows: list[int]) -> None:
    writer = ChatWriter(AnswerHead("j", "default", 0), "talk", choices=4, usage=False)
    events = b"".join(writer.part(MessagePart(row, {"content": "x"})) for row in (*rows, *rows)).split(b"\n\n")[:-1]
    choices = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
    assert [one["index"] for one in choices if "role" in one["delta"]] == [0, 1, 2, 3]
    assert [one["index"] for one in choices if "content" in one["delta"]] == [*rows, *rows]


def lines(*pieces: bytes) -> list[tuple[int, bytes]]:
    """The lines of a file that is read in these pieces, with their numbers."""

    async def read() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def listed() -> list[tuple[int, bytes]]:
        return [line async for line in lines_of(read(), 100)]

    return asyncio.run(listed())


@given(size=st.integers(1, 40), mark=st.sampled_from([b"", codecs.BOM_UTF8]))
def test_lines_of_a_batch_keep_their_numbers_however_the_file_is_cut(size: int, mark: bytes) -> None:
    file = mark + b'{"a"}\n\n \n{"b"}\r\n{"c"}'
    found = lines(*(file[at : at + size] for at in range(0, len(file), size)))
    assert found == [(1, b'{"a"}'), (4, b'{"b"}\r'), (5, b'{"c"}')]


def test_a_batch_has_so_many_lines_and_empty_ones_count() -> None:
    full = b"x\n" * MOST_LINES
    for file in (full, full[:-1]):
        assert [number for number, _ in lines(file)] == [*range(1, MOST_LINES + 1)]
    for over in (full + b"\n", full + b"x", b"\n" * MOST_LINES + b"x", b"\n" * 2**20):
        with pytest.raises(errors.RequestTooLargeError, match="expected 1 to 100000 lines"):
            lines(over)


def test_no_more_of_a_long_line_is_kept_than_it_may_have() -> None:
    assert [number for number, _ in lines(b"x" * 60, b"x" * 40, b"\nx")] == [1, 2]
    for long in ((b"x" * 60, b"x" * 41), (b"x" * 101 + b"\n",), (b" " * 60, b" " * 41)):
        with pytest.raises(errors.RequestTooLargeError, match="at most 100 bytes a line"):
            lines(*long)
