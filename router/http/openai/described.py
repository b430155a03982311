"""OpenAI's calls in the OpenAPI document: their bodies, headers and answers. No logic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from litestar.openapi.spec import Operation

from router.http.described import ASKED, KEYED, RUN, InferOperation, answers
from router.http.openai.answers import ChatCompletion, Completion, Embeddings, ListedModel, ModelList
from router.http.openai.asked import ChatCall, CompletionCall, EmbeddingsCall
from router.http.openai.batches import BatchCall
from router.http.openai.errors import ErrorContent
from router.http.openai.object_answers import BatchAnswer, Deleted, FileAnswer, Page
from router.http.openai.responses import DeletedResponse, ItemList, Response, ResponseCall
from taxiway.contract.tensors import OCTETS


class ChatOperation(InferOperation):
    """Describes a chat."""

    body: ClassVar[type[Any]] = ChatCall
    headers: ClassVar[Mapping[str, str]] = {
        "X-Taxiway-Deadline": "Seconds from acceptance, instead of the service's deadline.",
        "X-Taxiway-Budget": "The most that the request may cost, in US dollars.",
        "X-Taxiway-Locality": "A label that every device on the way must have.",
        "Idempotency-Key": "Calls with the same key are one job.",
        "X-Taxiway-Webhook": "A webhook endpoint that is told of the end: its name, id or address.",
    }


class CompletionOperation(ChatOperation):
    """Describes a completion."""

    body = CompletionCall


class EmbeddingsOperation(ChatOperation):
    """Describes a request for embeddings."""

    body = EmbeddingsCall


class BatchOperation(InferOperation):
    """Describes a request for a batch."""

    body: ClassVar[type[Any]] = BatchCall
    headers: ClassVar[Mapping[str, str]] = {
        "X-Taxiway-Webhook": "A webhook endpoint that is told of the end: its name, id or address.",
    }


class ResponseOperation(ChatOperation):
    """Describes a request for a response."""

    body = ResponseCall


class FileOperation(Operation):
    """Describes an upload."""

    def to_schema(self) -> dict[str, Any]:
        """The operation with its form."""
        fields = {"purpose": {"type": "string"}, "file": {"type": "string", "format": "binary"}}
        expiry = {"expires_after[anchor]": {"const": "created_at"}, "expires_after[seconds]": {"type": "integer"}}
        form = {"type": "object", "properties": {**fields, **expiry}, "required": [*fields]}
        content = {"multipart/form-data": {"schema": form}}
        return {**super().to_schema(), "requestBody": {"required": True, "content": content}}


MODELS = answers(ModelList, *KEYED, problem=ErrorContent)
MODEL = answers(ListedModel, *KEYED, 404, 503, problem=ErrorContent)
CHAT = answers(ChatCompletion, *KEYED, *ASKED, *RUN, problem=ErrorContent)
COMPLETION = answers(Completion, *KEYED, *ASKED, *RUN, problem=ErrorContent)
EMBEDDINGS = answers(Embeddings, *KEYED, *ASKED, *RUN, problem=ErrorContent)
RESPONSE_CREATE = answers(Response, *KEYED, *ASKED, *RUN, problem=ErrorContent)
RESPONSE = answers(Response, *KEYED, 400, 404, 503, problem=ErrorContent)
RESPONSE_CANCEL = answers(Response, *KEYED, 400, 404, 503, problem=ErrorContent)
RESPONSE_DELETED = answers(DeletedResponse, *KEYED, 404, 503, problem=ErrorContent)
RESPONSE_INPUT = answers(ItemList, *KEYED, 400, 404, 503, problem=ErrorContent)
FILE_UPLOAD = answers(FileAnswer, *KEYED, 400, 404, 413, 415, 503, problem=ErrorContent)
FILE = answers(FileAnswer, *KEYED, 404, 503, problem=ErrorContent)
FILES = answers(Page, *KEYED, 400, 503, problem=ErrorContent)
DELETED = answers(Deleted, *KEYED, 404, 503, problem=ErrorContent)
FILE_CONTENT = answers(bytes, *KEYED, 404, 503, media=OCTETS, problem=ErrorContent)
BATCH_CREATE = answers(BatchAnswer, *KEYED, 400, 404, 413, 415, 503, problem=ErrorContent)
BATCH = answers(BatchAnswer, *KEYED, 404, 503, problem=ErrorContent)
BATCHES = answers(Page, *KEYED, 400, 503, problem=ErrorContent)
"""What each call answers, by status; a stream has the status 200, too."""
