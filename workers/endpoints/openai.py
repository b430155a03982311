"""The API of OpenAI, as vLLM, SGLang, llama.cpp, TGI and hosted providers have it.

Chats and generations are always streamed from the engine, so that tokens, usage and aborts are known as they happen.
A variant with the entry `completions` sends its prompt as it is; else a prompt is a chat's only message. One with the
entry `rerank` scores its second text by its first one, in the form of Jina, Cohere, vLLM and llama.cpp.

Source: https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np

from tasks.models.chats import TOKENS_OF_MESSAGE, answer_limit, asks, characters, most_tokens, read_chat
from tasks.models.discovered import Announced
from tasks.models.model import ANSWER_BOUND
from tasks.models.sizes import CHARACTERS_PER_TOKEN, MOST_SIZE, clamped
from taxiway.contract.job import Tokens
from taxiway.contract.server_events import EventParser, EventTooLargeError
from taxiway.contract.stream import NOTHING, CutGeneration, Delta, SentMessage
from taxiway.errors import cut, wrong_field
from workers.endpoints.plain_text import PlainText, is_plain, streamed
from workers.endpoints.protocol import (
    AnswerReader,
    AskItem,
    Discovery,
    EndpointError,
    EngineRequest,
    FaultKind,
    ServedModel,
    WholeReader,
    decoded,
    malformed,
)
from workers.pipelines.text import read_text
from workers.port import Row

HEALTH = ABOUT = "/models"
"""Where an endpoint lists its models, and tells which engine has them."""

MAX_STREAM = 16 * 2**20
"""Bytes of a streamed answer that are kept."""

_BYTES_A_TOKEN = 4096  # of its event at most, beside: an engine repeats the model's name and more in each
_PIECES, _PIECES_A_TOKEN = 1000, 4  # of an answer at most: engines send about one for each token
MAX_ONE = 4 * 2**20
"""Bytes of an answer that is one embedding or score: over 100,000 numbers."""

_END = "[DONE]"
_IMAGES = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
_COMPLETIONS, _RERANK, _LOGPROBS = "completions", "rerank", "logprobs"


class EngineUsage(msgspec.Struct, frozen=True):
    """Tokens as the engine counts them, which may be anything until `within` has bounded it."""

    prompt_tokens: Any = 0
    completion_tokens: Any = 0
    total_tokens: Any = 0
    prompt_tokens_details: Any = None
    completion_tokens_details: Any = None

    def within(self, most: Tokens) -> EngineUsage:
        """The same, with no figure below 0 and none above what the request may have."""
        read, written = _count(self.prompt_tokens, most.input), _count(self.completion_tokens, most.output)
        pairs = (self.prompt_tokens_details, read), (self.completion_tokens_details, written)
        return EngineUsage(read, written, read + written, *(_counts(details, bound) for details, bound in pairs))

    def excess(self, most: Tokens) -> int:
        """How many tokens are beyond what the request may have."""
        pairs = (self.prompt_tokens, most.input), (self.completion_tokens, most.output)
        return sum(_count(figure, MOST_SIZE) - _count(figure, bound) for figure, bound in pairs)

    def joined(self, before: int) -> EngineUsage:
        """The same for the whole of an answer whose first tokens, so many, were read as part of the prompt."""
        read, written = max(self.prompt_tokens - before, 0), self.completion_tokens + before
        details = None if self.prompt_tokens_details is None else _counts(self.prompt_tokens_details, read)
        return EngineUsage(read, written, read + written, details, self.completion_tokens_details)

    @property
    def tokens(self) -> Tokens:
        """They, as we count them; for figures that are bounded."""
        cached = (self.prompt_tokens_details or {}).get("cached_tokens", 0)
        return Tokens(input=self.prompt_tokens, cached=cached, output=self.completion_tokens)


def _count(figure: Any, most: int) -> int:
    """A figure as a number of tokens from 0 to `most`; 0 if it is none."""
    known = type(figure) is int or (type(figure) is float and math.isfinite(figure))
    return min(max(int(figure), 0), most) if known else 0


def _counts(details: Any, most: int) -> dict[str, int] | None:
    """The parts of `most` tokens that an engine counts, each as `_count` has it; None if it names none."""
    if not isinstance(details, dict):
        return None
    return {name: _count(figure, most) for name, figure in details.items() if figure is not None}


class _Call(msgspec.Struct, frozen=True, omit_defaults=True):
    index: int = 0
    id: str | None = None
    type: str | None = None
    function: dict[str, Any] = {}

    def as_delta(self, *, first: bool) -> dict[str, Any]:
        """The call in OpenAI's form: its type and name come first, and what an engine sets to null is left out."""
        named: dict[str, Any] = {"type": "function"} if first else {}
        function = {name: value for name, value in self.function.items() if value is not None}
        if first:
            function = {"name": "", "arguments": "", **function}
        return {**named, **msgspec.to_builtins(self), "function": function}


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Logprobs(msgspec.Struct, frozen=True):
    """In a chat's form, or in lists as a completion has them."""

    content: list[dict[str, Any]] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float] | None] | None = None

    @property
    def entries(self) -> list[dict[str, Any]]:
        """One entry a token, in a chat's form."""
        if self.tokens is None:
            return self.content or []
        likely = self.top_logprobs or [None] * len(self.tokens)
        return [
            {**_probability(token, own), "top_logprobs": [_probability(*one) for one in (top or {}).items()]}
            for token, own, top in zip(self.tokens, self.token_logprobs, likely, strict=False)
        ]


def _probability(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}


class _Choice(msgspec.Struct, frozen=True):
    index: int = 0
    delta: _Delta = _Delta()
    logprobs: _Logprobs | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Timings(msgspec.Struct, frozen=True):
    """What llama.cpp counts with each piece."""

    cache_n: Any = 0
    prompt_n: Any = 0
    predicted_n: Any = 0

    @property
    def usage(self) -> EngineUsage:
        cached = _count(self.cache_n, MOST_SIZE)
        read = _count(self.prompt_n, MOST_SIZE) + cached
        return EngineUsage(read, self.predicted_n, prompt_tokens_details={"cached_tokens": cached})


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: EngineUsage | None = None
    timings: _Timings | None = None
    error: Any = None

    @property
    def counted(self) -> EngineUsage | None:
        """The tokens that it counts, if it does."""
        return self.usage if self.usage is not None or self.timings is None else self.timings.usage


class _Embedding(msgspec.Struct, frozen=True):
    embedding: list[float]


class _Embeddings(msgspec.Struct, frozen=True):
    NAME: ClassVar[str] = "embedding"
    data: list[_Embedding]
    usage: EngineUsage | None = None

    @property
    def found(self) -> list[Any]:
        return [np.array(one.embedding, np.float32) for one in self.data]


class _Rank(msgspec.Struct, frozen=True):
    relevance_score: float


class _Ranks(msgspec.Struct, frozen=True):
    NAME: ClassVar[str] = "score"
    results: list[_Rank]
    usage: EngineUsage | None = None

    @property
    def found(self) -> list[Any]:
        return [np.float32(one.relevance_score) for one in self.results]


class _Listed(msgspec.Struct, frozen=True):
    id: str
    aliases: list[str] = []
    owned_by: str = ""
    max_model_len: int | None = None  # of vLLM and SGLang


class _Described(msgspec.Struct, frozen=True):
    name: str = ""
    capabilities: list[str] = []


class _Models(msgspec.Struct, frozen=True):
    data: list[_Listed]
    models: list[_Described] = []


_chunk = msgspec.json.Decoder(_Chunk).decode
_embeddings = msgspec.json.Decoder(_Embeddings).decode
_ranks = msgspec.json.Decoder(_Ranks).decode
_models = msgspec.json.Decoder(_Models).decode


def prepare(served: ServedModel, row: Row, parameters: Mapping[str, Any]) -> AskItem:
    """See `protocol.EndpointProtocol`."""
    return _PREPARE[served.model.pipeline](served, row, parameters)


def extensions(body: bytes) -> Collection[str]:
    """The engines that have the listed models, by what they call themselves."""
    return frozenset(one.owned_by for one in decoded(_models, body).data)


def announced(body: bytes) -> Sequence[str] | None:
    """The names in a list of models; llama.cpp lists further ones of each."""
    return [name for one in decoded(_models, body).data for name in (one.id, *one.aliases)]


def discover() -> Discovery:
    """See `protocol.EndpointProtocol`. A model chats, unless the server says that it only embeds (llama.cpp does)."""
    listed = decoded(_models, (yield "GET", HEALTH, b""))
    embed = {
        one.name for one in listed.models if "embedding" in one.capabilities and "completion" not in one.capabilities
    }
    return {
        one.id: Announced("text") if one.id in embed else Announced("chat", context=max(one.max_model_len or 0, 0))
        for one in listed.data
    }


class StreamReader(AnswerReader):
    """Reads a streamed chat or completion: `message`, `text`, `tokens`, `finish-reason`, `usage` and `logprobs`.

    `most` are the tokens that the request may have. What comes is bounded by them, too: an engine that goes on and on
    would fill this worker's memory, and the store's. The answer begins with what is `kept` of it.
    """

    def __init__(self, most: Tokens, kept: CutGeneration = NOTHING) -> None:
        self._most = most
        self._before = self.written = kept.tokens
        self._pieces_left = _PIECES + _PIECES_A_TOKEN * most.output
        self._bytes_left = MAX_STREAM + _BYTES_A_TOKEN * most.output
        self._kept_left = MAX_STREAM
        self._events = EventParser()
        self._message = SentMessage()
        self._message.add({"content": kept.text})
        self._called: dict[int, int] = {}  # the engine's indices of calls, with ours
        self._finish = "" if most.output else "length"
        self._usage: EngineUsage | None = None

    @property
    def text(self) -> str:  # type: ignore[override]  # a plain attribute for readers that have none
        """See `AnswerReader`."""
        return self._message.text("content")

    @property
    def more(self) -> bool:  # type: ignore[override]  # the same
        """See `AnswerReader`."""
        return not self._message.is_plain

    def feed(self, chunk: bytes) -> list[str | Delta]:
        """The text that the chunk's events add, and other deltas, in the engine's order."""
        self._bytes_left -= len(chunk)
        try:
            events = self._events.feed(chunk)
        except EventTooLargeError as error:
            raise malformed(str(error)) from error
        parts = [part for event in events for part in self._take(event.data)]
        if min(self._bytes_left, self._kept_left) < 0 or self.pieces > self._pieces_left:
            raise malformed(f"at most {self._most.output} tokens do not end: {self.pieces} pieces so far")
        return parts

    def answer(self) -> Row:
        """The whole answer. An engine that did not count its tokens sent about one in each piece."""
        if not self._finish:
            raise EndpointError(FaultKind.BROKEN, "the endpoint's stream ended before the answer did")
        usage, logprobs = None if self._usage is None else self._usage.joined(self._before), self._message.logprobs
        return {
            "message": self._whole(),
            "text": self._message.text("content"),
            "tokens": usage.completion_tokens if usage is not None else self._before + self.pieces,
            "finish-reason": self._finish,
            "usage": None if usage is None else msgspec.to_builtins(usage),
            "logprobs": {"content": logprobs} if logprobs else None,
        }

    def _take(self, text: str) -> Iterator[str | Delta]:
        if self.done:
            return
        if text == _END:
            self.done = True
            return
        chunk = decoded(_chunk, text)
        if (error := chunk.error) is not None:
            said = cut(str(error.get("message", error) if isinstance(error, dict) else error), 500)
            raise EndpointError(FaultKind.BROKEN, f"the endpoint failed in the middle of its answer: {said}")
        counted = chunk.counted
        if counted is not None:
            self._usage = counted.within(self._most)
            self.tokens, self.excess = self._usage.tokens, counted.excess(self._most)
        for choice in chunk.choices:
            if choice.index == 0:
                for part in self._add(choice):
                    self._kept_left -= len(part if isinstance(part, str) else text)
                    yield part

    def _add(self, choice: _Choice) -> Iterator[str | Delta]:
        """The deltas of a choice: reasoning before text, and calls after it."""
        self._finish = choice.finish_reason or self._finish
        delta, text = choice.delta, choice.delta.content or choice.text or ""
        self.pieces += bool(text or delta.reasoning_content or delta.tool_calls)
        before = {name: more for name in ("reasoning_content", "refusal") if (more := getattr(delta, name))}
        after: dict[str, Any] = {}
        if delta.tool_calls:
            after["tool_calls"] = [self._call(call) for call in delta.tool_calls]
        if choice.logprobs is not None and (entries := choice.logprobs.entries):
            after["logprobs"] = entries
        if text:
            self.written = self._before + (self.pieces if self._usage is None else self._usage.completion_tokens)
        for part in (before, text, after):
            if part:
                self._message.add({"content": part} if isinstance(part, str) else part)
                yield part

    def _call(self, call: _Call) -> dict[str, Any]:
        first = call.index not in self._called
        index = self._called.setdefault(call.index, len(self._called))
        return {**call.as_delta(first=first), "index": index}

    def _whole(self) -> dict[str, Any]:
        said, calls = self._message, self._message.calls
        text = said.text("content")
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
        message |= {name: more for name in ("reasoning_content", "refusal") if (more := said.text(name))}
        if calls:
            message["tool_calls"] = calls
        if said.logprobs:
            message["logprobs"] = {"content": said.logprobs}
        return message


class OneReader(WholeReader):
    """Reads an answer that is one embedding, or one score of a document, which becomes `output`."""

    def __init__(self, output: str, decode: Callable[[bytes | str], _Embeddings | _Ranks], most: Tokens) -> None:
        super().__init__(self._one, MAX_ONE)
        self._output, self._decode, self._reserved = output, decode, most

    def _one(self, raw: bytes) -> Row:
        answer = decoded(self._decode, raw)
        if answer.usage is not None:
            reserved = self._reserved
            self.tokens, self.excess = answer.usage.within(reserved).tokens, answer.usage.excess(reserved)
        if len(found := answer.found) != 1:
            raise malformed(f"expected one {answer.NAME}, got {len(found)}")
        return {self._output: found[0]}


def _prepare_chat(served: ServedModel, row: Row, parameters: Mapping[str, Any]) -> AskItem:
    name = served.model.inputs[0].name
    field = f"inputs.{name}"
    chat = read_chat(row.get(name), field)
    if refused := served.variant.refuses(asks(chat)):  # what a router could not read
        raise wrong_field(field, "what the endpoint honours or forwards", refused, asked=refused)
    limit = clamped(answer_limit(chat) or int(parameters[ANSWER_BOUND]))
    most = Tokens(input=most_tokens(chat) or 0, output=limit)
    size = (characters(chat) or 0) // CHARACTERS_PER_TOKEN + limit
    if "max_completion_tokens" not in chat:
        chat["max_tokens"] = limit
    chat["messages"] = [_with_images(message) for message in chat["messages"]]
    text = PlainText({**chat, "model": served.called}, served.extensions, most, StreamReader)
    return _streamed("/chat/completions", text, size, {**parameters, ANSWER_BOUND: limit})


def _prepare_prompt(served: ServedModel, row: Row, parameters: Mapping[str, Any]) -> AskItem:
    prompt = read_text(served.model.inputs[0].name, row)
    given = {key: value for key, value in parameters.items() if value is not None}
    size = len(prompt) // CHARACTERS_PER_TOKEN + int(parameters[ANSWER_BOUND])
    most = Tokens(input=_most_read(prompt), output=int(parameters[ANSWER_BOUND]))
    if served.variant.entry == _COMPLETIONS:
        body = {"prompt": prompt, **given, "model": served.called}
        text = PlainText(body, served.extensions, most, StreamReader)
        return _streamed("/completions", text, size, parameters)
    if (likely := given.get(_LOGPROBS)) is not None:
        given |= {_LOGPROBS: True, "top_logprobs": likely}
    chat = {"messages": [{"role": "user", "content": prompt}], **given, "model": served.called}
    text = PlainText(chat, served.extensions, most, StreamReader)
    return _streamed("/chat/completions", text, size, parameters)


def _prepare_rerank(served: ServedModel, row: Row, parameters: Mapping[str, Any]) -> AskItem:
    query, document = (read_text(spec.name, row) for spec in served.model.inputs[:2])
    body = {"model": served.called, "query": query, "documents": [document], "top_n": 1}
    most, output = Tokens(input=_most_read(query) + _most_read(document)), served.model.outputs[0].name
    ask = EngineRequest("/rerank", msgspec.json.encode(body), lambda _: OneReader(output, _ranks, most))
    return AskItem({}, max(len(query + document) // CHARACTERS_PER_TOKEN, 1), parameters, ask=ask)


def _prepare_text(served: ServedModel, row: Row, parameters: Mapping[str, Any]) -> AskItem:
    if served.variant.entry == _RERANK:
        return _prepare_rerank(served, row, parameters)
    text, output = read_text(served.model.inputs[0].name, row), served.model.outputs[0].name
    body = {"model": served.called, "input": text, "encoding_format": "float"}

    most = Tokens(input=_most_read(text))
    ask = EngineRequest("/embeddings", msgspec.json.encode(body), lambda _: OneReader(output, _embeddings, most))
    return AskItem({}, max(len(text) // CHARACTERS_PER_TOKEN, 1), parameters, ask=ask)


_PREPARE: Mapping[str, Callable[[ServedModel, Row, Mapping[str, Any]], AskItem]] = {
    "chat": _prepare_chat,
    "generation": _prepare_prompt,
    "text": _prepare_text,
}


def _most_read(text: str) -> int:
    """The most tokens that an engine may make of a text: one a byte, and what a template adds."""
    return len(text.encode(errors="replace")) + 2 * TOKENS_OF_MESSAGE


def _streamed(path: str, text: PlainText, size: int, parameters: Mapping[str, Any]) -> AskItem:
    plain, seed = is_plain(text.body), text.body.get("seed")
    body = {**text.body, **text.counted} if plain else text.body
    ask = streamed(path, body, lambda _: StreamReader(text.most))
    go_on = text.go_on if plain and text.can_go_on else None
    return AskItem({}, size, parameters, ask=ask, go_on=go_on, plain=plain, seed=seed if type(seed) is int else None)


def _with_images(message: dict[str, Any]) -> dict[str, Any]:
    """The message with images that came as bytes as data URLs, which is the form that engines take."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_with_image(part) for part in content]}


def _with_image(part: Any) -> Any:
    image = part.get("image_url") if isinstance(part, dict) else None
    if not isinstance(image, dict):
        return part
    url = image.get("url")
    if not isinstance(url, bytes | bytearray | memoryview):
        return part
    content = bytes(url)
    kind = next((kind for mark, kind in _IMAGES.items() if content.startswith(mark)), "octet-stream")
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {**part, "image_url": {**image, "url": data}}
