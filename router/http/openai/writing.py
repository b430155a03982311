"""The answer to a call, as JSON, from its job's result."""

from __future__ import annotations

from typing import Any

import msgspec

from router.http.openai.answers import Head, chat_completion, completion, embeddings
from router.http.openai.asked import ChatCall, CompletionCall, EmbeddingsCall
from tasks.models.catalogue import Model
from taxiway.contract.job import Result

AnyCall = ChatCall | CompletionCall | EmbeddingsCall

_encode = msgspec.json.Encoder().encode


def written(call: AnyCall, model: Model, head: Head, result: Result) -> bytes:
    """The whole answer."""
    return _encode(_answer(call, model, head, result))


def _answer(call: AnyCall, model: Model, head: Head, result: Result) -> Any:
    if isinstance(call, ChatCall):
        return chat_completion(head, result)
    if isinstance(call, CompletionCall):
        return completion(head, result)
    texts = [call.input] if isinstance(call.input, str) else call.input
    packed = call.encoding_format == "base64"
    return embeddings(head, result, model=model, texts=texts, packed=packed, dimensions=call.dimensions)
