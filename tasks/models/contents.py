"""What is told of a request's inputs to who places it, without decoding its rows; of sealed inputs it is told."""

from __future__ import annotations

from tasks.models.chats import answer_limit, asks, most_tokens
from tasks.models.model import Model
from tasks.models.profiles import ANSWER_BOUND, generates
from tasks.models.sizes import given_inputs, measured, rows_of
from taxiway.contract.limits import COUNT
from taxiway.contract.request import Request
from taxiway.contract.sealed import ContentFacts, sealed_in


def facts_of(model: Model, request: Request) -> ContentFacts:
    """The facts of the request's inputs.

    Raises:
        InvalidRequestError, RequestTooLargeError: as `sizes.measured` and `chats.asks`.
    """
    sealed = sealed_in(request.inputs)
    if sealed is not None:
        return sealed.facts
    name, limit = model.inputs[0].name, request.parameters.get(ANSWER_BOUND)
    chat = given_inputs(model, request.inputs).get(name) if model.pipeline == "chat" else None
    limit = answer_limit(chat) or limit
    bound = limit if isinstance(limit, int) else int(model.parameters[ANSWER_BOUND].default) if generates(model) else 0
    return ContentFacts(
        rows=rows_of(model, request.inputs),
        size=measured(model, request.inputs),
        longest=min(max(bound, 0), COUNT),
        most_read=most_tokens(chat),
        asks=asks(chat, f"inputs.{name}") if model.pipeline == "chat" else (),
    )
