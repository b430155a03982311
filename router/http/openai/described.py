"""OpenAI's calls in the OpenAPI document: their bodies, headers and answers. No logic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from router.http.described import ASKED, KEYED, RUN, InferOperation, answers
from router.http.openai.answers import ChatCompletion, Completion, Embeddings, ListedModel, ModelList
from router.http.openai.asked import ChatCall, CompletionCall, EmbeddingsCall
from router.http.openai.errors import ErrorContent


class ChatOperation(InferOperation):
    """Describes a chat."""

    body: ClassVar[type[Any]] = ChatCall
    headers: ClassVar[Mapping[str, str]] = {
        "X-Taxiway-Deadline": "Seconds from acceptance, instead of the service's deadline.",
        "X-Taxiway-Budget": "The most that the request may cost, in US dollars.",
        "X-Taxiway-Locality": "A label that every device on the way must have.",
        "Idempotency-Key": "Calls with the same key are one job.",
    }


class CompletionOperation(ChatOperation):
    """Describes a completion."""

    body = CompletionCall


class EmbeddingsOperation(ChatOperation):
    """Describes a request for embeddings."""

    body = EmbeddingsCall


MODELS = answers(ModelList, *KEYED, problem=ErrorContent)
MODEL = answers(ListedModel, *KEYED, 404, 503, problem=ErrorContent)
CHAT = answers(ChatCompletion, *KEYED, *ASKED, *RUN, problem=ErrorContent)
COMPLETION = answers(Completion, *KEYED, *ASKED, *RUN, problem=ErrorContent)
EMBEDDINGS = answers(Embeddings, *KEYED, *ASKED, *RUN, problem=ErrorContent)
"""What each call answers, by status; a stream has the status 200, too."""
