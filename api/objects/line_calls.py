"""The calls that a batch's lines may make: OpenAI's, and infer requests for a model. Each is read, run and answered."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

from api.errors import error_answer
from api.inference.protocol import answer_of, read_infer, request_of
from api.openai.answers import AnswerHead, written
from api.openai.requests import (
    ChatCall,
    CompletionCall,
    EmbeddingsCall,
    chat_fields,
    completion_fields,
    embedding_fields,
    read_call,
    unsupported,
)
from router.service.admission import Rules
from taxiway.contract.job import Result
from taxiway.contract.request import TERMS
from taxiway.errors import TaxiwayError, wrong_field

_OPENAI: Mapping[str, tuple[type[Any], Callable[..., dict[str, Any]]]] = {
    "/v1/chat/completions": (ChatCall, chat_fields),
    "/v1/completions": (CompletionCall, completion_fields),
    "/v1/embeddings": (EmbeddingsCall, embedding_fields),
}
_INFER = re.compile(r"/v2/models/([^/]+)/infer")


@dataclass(frozen=True, slots=True)
class LineCall:
    """What a line asks for: the request's fields without service terms, and the JSON of its answer."""

    fields: Mapping[str, Any]
    answer: Callable[[AnswerHead, Result], bytes]


def check_endpoint(endpoint: str, rules: Rules) -> None:
    """Refuse a batch of other calls.

    Raises:
        InvalidRequestError: lines cannot make that call.
        UnknownModelError, ModelUnavailableError: it is for a model that is not served.
    """
    if (infer := _INFER.fullmatch(endpoint)) is not None:
        rules.catalogue.resolve(unquote(infer[1]))
    elif endpoint not in _OPENAI:
        raise wrong_field("endpoint", f"one of {[*sorted(_OPENAI), '/v2/models/MODEL/infer']}", endpoint)


def read_line_call(endpoint: str, body: bytes, rules: Rules) -> LineCall:
    """The call in a line's body.

    Raises:
        TaxiwayError: it is invalid, names a service term, or is for a model that is not served.
    """
    infer = _INFER.fullmatch(endpoint)
    return _openai_call(endpoint, body, rules) if infer is None else _infer_call(unquote(infer[1]), body, rules)


def failure(error: TaxiwayError, endpoint: str) -> bytes:
    """The JSON of an answer that is an error."""
    return b"".join(error_answer(error, endpoint).pieces)


def _openai_call(endpoint: str, body: bytes, rules: Rules) -> LineCall:
    kind, fields = _OPENAI[endpoint]
    parsed = read_call(body, kind, rules.topology.limits)
    if getattr(parsed.call, "stream", None):
        raise unsupported("stream", "nothing, as lines of a batch are not streamed", True)
    _check_terms(parsed.terms)
    model = rules.catalogue.resolve(parsed.call.model)
    return LineCall(fields(parsed, model), partial(written, parsed.call, model))


def _infer_call(reference: str, body: bytes, rules: Rules) -> LineCall:
    model = rules.catalogue.resolve(reference)
    infer = read_infer(body, most=rules.topology.limits.elements)
    _check_terms({name: value for name, value in infer.parameters.items() if name in TERMS})
    request = request_of(reference, infer, rules.topology.limits.elements)

    def answer(head: AnswerHead, result: Result) -> bytes:
        return answer_of(model, head.job, result, lambda _: False, infer.id).body

    names = ("model", "inputs", "parameters", "outputs")
    return LineCall({name: getattr(request, name) for name in names}, answer)


def _check_terms(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        raise wrong_field(name, "no service term in a line, as all lines have their batch's", value)
