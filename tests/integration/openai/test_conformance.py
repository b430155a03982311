"""Each call of the stock SDK that OpenAI's API has: its answer is valid by the SDK's own types, and so is an error.

`docs/openai.md` has the table of these calls.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import BaseModel
from openai.types import Batch, Completion, CreateEmbeddingResponse, FileDeleted, FileObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from openai.types.responses.response_input_message_item import ResponseInputMessageItem

from tests.openai_fleet import SECOND, OpenAIFleet, openai_fleet

DOCS = Path(__file__).parents[3] / "docs" / "openai.md"
CHAT: Any = {"model": SECOND, "n": 2, "messages": [{"role": "user", "content": "think=hm one call=add:{}"}]}
LINE = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"model": "vector", "input": "a"}}
TALE: Any = {"model": "tale", "prompt": ["a b", "c"], "logprobs": 1}
TALK: Any = {"model": "talk", "input": "a b"}
VECTOR: Any = {"model": "vector", "input": ["a"]}
UNSUPPORTED = "unsupported_parameter"
BATCH: Any = {"endpoint": "/v1/embeddings", "completion_window": "24h"}
UPLOAD: Any = {"file": ("lines.jsonl", json.dumps(LINE).encode()), "purpose": "batch"}


@dataclass(frozen=True)
class Call:
    """A method of the SDK. `made` names the fields that are ids of objects made before.

    `kind` is the type of its answer, of each object of a page, or of each event; None if it has no answer of a type.
    `wrong` are fields that are refused, with the `code`.
    """

    name: str
    fields: dict[str, Any]
    kind: type[BaseModel] | None
    wrong: dict[str, Any]
    code: str
    made: dict[str, str] = field(default_factory=dict)
    stream: bool = False

    @property
    def row(self) -> str:
        """Its row in the table."""
        name = f"{self.name}(stream=True)" if self.stream else self.name
        kind = f"`{self.kind.__name__}`" if self.kind is not None else "events" if self.stream else "none"
        return f"| `{name}` | {kind} | {f'`{self.code}`' if self.code else 'none'} |"


NO_MODEL = {"model": "none"}
NONE = "unknown_object"
FROM_FILE = {"input_file_id": "file"}
NO_RESPONSE = {"response_id": "none"}
STORED = {"response_id": "response"}
CALLS = [
    Call("models.list", {}, Model, {}, ""),
    Call("models.retrieve", {"model": SECOND}, Model, NO_MODEL, "model_not_found"),
    Call("chat.completions.create", CHAT, ChatCompletion, NO_MODEL, "model_not_found"),
    Call("chat.completions.create", CHAT, ChatCompletionChunk, {"n": 0}, "invalid_value", stream=True),
    Call("completions.create", TALE, Completion, {"echo": True}, UNSUPPORTED),
    Call("completions.create", TALE, Completion, NO_MODEL, "model_not_found", stream=True),
    Call("embeddings.create", VECTOR, CreateEmbeddingResponse, {"input": 1}, "invalid_value"),
    Call("responses.create", TALK, Response, {"truncation": "auto"}, UNSUPPORTED),
    Call("responses.create", TALK, None, NO_MODEL, "model_not_found", stream=True),
    Call("responses.retrieve", {}, Response, NO_RESPONSE, NONE, made=STORED),
    Call("responses.retrieve", {"starting_after": 1}, None, NO_RESPONSE, NONE, made=STORED, stream=True),
    Call("responses.cancel", {}, Response, NO_RESPONSE, NONE, made={"response_id": "background"}),
    Call("responses.input_items.list", {}, ResponseInputMessageItem, NO_RESPONSE, NONE, made=STORED),
    Call("responses.delete", {}, None, NO_RESPONSE, NONE, made=STORED),
    Call("files.create", UPLOAD, FileObject, {"purpose": "none"}, "invalid_value"),
    Call("files.list", {}, FileObject, {"limit": 0}, "invalid_value"),
    Call("files.retrieve", {}, FileObject, {"file_id": "none"}, NONE, made={"file_id": "file"}),
    Call("files.content", {}, None, {"file_id": "none"}, NONE, made={"file_id": "file"}),
    Call("files.delete", {}, FileDeleted, {"file_id": "none"}, NONE, made={"file_id": "file"}),
    Call("batches.create", BATCH, Batch, {"completion_window": "soon"}, "invalid_value", made=FROM_FILE),
    Call("batches.list", {}, Batch, {"limit": 0}, "invalid_value"),
    Call("batches.retrieve", {}, Batch, {"batch_id": "none"}, NONE, made={"batch_id": "batch"}),
    Call("batches.cancel", {}, Batch, {"batch_id": "none"}, NONE, made={"batch_id": "batch"}),
]


def table() -> str:
    """The table of all calls, as the documentation has it."""
    return "\n".join(["| call of the SDK | answer | an error |", "| --- | --- | --- |", *(call.row for call in CALLS)])


def test_the_documentation_has_the_table_of_these_calls() -> None:
    assert table() in DOCS.read_text()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIFleet]:
    folder = tmp_path_factory.mktemp("conformance")
    with openai_fleet(folder, ["--files", str(folder / "files")]) as fleet:
        yield fleet


@pytest.fixture(params=["sync", "async"])
def either(request: pytest.FixtureRequest, fleet: OpenAIFleet, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` by each kind of client."""

    async def asynchronous(name: str, fields: dict[str, Any]) -> Any:
        async with openai.AsyncOpenAI(base_url=fleet.url, api_key="none", max_retries=0, timeout=30) as client:
            found = reduce(getattr, name.split("."), client)(**fields)  # type: ignore[operator]  # a method
            found = found if name.endswith("list") else await found
            listed = isinstance(found, openai.AsyncStream) or name.endswith("list")
            return [one async for one in found] if listed else found

    return call if request.param == "sync" else lambda name, **fields: asyncio.run(asynchronous(name, fields))


def made(call: Callable[..., Any], kind: str) -> str:
    """The id of an object of a kind."""
    if kind == "batch":
        return str(call("batches.create", **BATCH, input_file_id=made(call, "file")).id)
    if kind == "file":
        return str(call("files.create", **UPLOAD).id)
    return str(call("responses.create", model="talk", input="a", background=kind == "background").id)


@pytest.mark.parametrize("asked", CALLS, ids=lambda asked: f"{asked.name}{'-stream' if asked.stream else ''}")
def test_a_call_gets_what_the_sdk_expects(either: Callable[..., Any], asked: Call) -> None:
    ids = {name: made(either, kind) for name, kind in asked.made.items()}
    fields = {**asked.fields, **ids, **({"stream": True} if asked.stream else {})}
    found = either(asked.name, **fields)

    answers = found if isinstance(found, list) else [found] if isinstance(found, BaseModel) else []
    assert all(asked.kind is None or type(answer) is asked.kind for answer in answers)
    assert bool(answers) == (asked.kind is not None or asked.stream)
    for answer in answers:
        stated: Any = answer.to_dict(mode="json")
        if asked.stream and asked.kind is Completion:  # the SDK has no type for a part, which has no reason yet
            stated["choices"] = [
                {**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in stated["choices"]
            ]
        type(answer).model_validate(stated)  # the SDK itself only reads
    if asked.code:
        with pytest.raises(openai.APIStatusError) as caught:
            either(asked.name, **{**fields, **asked.wrong})
        assert caught.value.code == asked.code
