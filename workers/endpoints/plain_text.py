"""Plain text from engines with OpenAI's API, and how each goes on after its answer was cut. Pure.

An engine goes on where it reads prompt and text as one. A completion's prompt is given. Of a chat, llama.cpp tells what
its template makes of the messages, and vLLM and SGLang continue a last message that is the assistant's.

Sources: llama.cpp, tools/server/README.md (`/apply-template`, `timings_per_token`); vLLM's OpenAI-compatible server
(`continue_final_message`, `continuous_usage_stats`), which SGLang follows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from tasks.models.chats import LIMITS, ROLES, answer_limit, honoured
from taxiway.contract.job import Tokens
from taxiway.contract.stream import CutGeneration
from workers.endpoints.protocol import AnswerReader, Continuing, EngineRequest, decoded

LLAMA_CPP, VLLM, SGLANG = "llamacpp", "vllm", "sglang"
"""What engines call themselves in their list of models (`owned_by`)."""

TEMPLATE = "/apply-template"
"""Where llama.cpp, at its root, tells the prompt that it makes of a chat."""

_SAMPLING = frozenset(
    [
        *("prompt", "top_p", "top_k", "min_p", "typical_p", "top_n_sigma", "logit_bias", "min_tokens", "ignore_eos"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "repeat_penalty", "repeat_last_n"),
        *("stop_token_ids", "bad_words", "skip_special_tokens"),
    ]
)
"""Fields that shape plain text, and mean the same for the rest of it. By others an answer may have more than text."""

_OF_OUTPUT = ("presence_penalty", "frequency_penalty")  # of what an engine wrote; llama.cpp counts the prompt as well

Reading = Callable[[Tokens, CutGeneration], AnswerReader]
"""Makes the reader of an answer that goes on after what is kept, given the tokens that the part may have."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """A request for plain text to an `engine`, which may use `most` tokens: its body without how it is streamed."""

    body: Mapping[str, Any]
    engine: Collection[str]
    most: Tokens
    read: Reading

    @property
    def counted(self) -> Mapping[str, Any]:
        """Fields of the body by which the engine counts its tokens with each piece of text."""
        if LLAMA_CPP in self.engine:
            return {"timings_per_token": True}
        more = {"continuous_usage_stats": True} if {VLLM, SGLANG} & set(self.engine) else {}
        return {"stream_options": {"include_usage": True, **more}}

    @property
    def can_go_on(self) -> bool:
        """Whether the engine can continue its answer."""
        if LLAMA_CPP in self.engine:
            return True
        known = "prompt" in self.body or bool({VLLM, SGLANG} & set(self.engine))
        return known and not any(self.body.get(name) for name in _OF_OUTPUT)

    def go_on(self, kept: CutGeneration) -> Continuing:
        """See `Continuing`."""
        left = max((answer_limit(self.body) or self.most.output) - kept.tokens, 0)
        most = Tokens(input=self.most.input + max(kept.tokens, len(kept.text.encode())), output=left)
        if not left:
            return self.read(most, kept).answer()
        body = {name: value for name, value in self.body.items() if name not in LIMITS} | {"max_tokens": left}
        if least := body.get("min_tokens"):
            body["min_tokens"] = max(least - kept.tokens, 0)
        path = "/completions"
        if "prompt" in body:
            body["prompt"] += kept.text
        elif LLAMA_CPP in self.engine:
            answer = yield "POST", TEMPLATE, msgspec.json.encode({"messages": body.pop("messages")})
            body["prompt"] = decoded(_decode_template, answer).prompt + kept.text
        else:
            path = "/chat/completions"
            body["messages"] = [*body["messages"], {"role": "assistant", "content": kept.text}]
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return streamed(path, {**body, **self.counted}, lambda _: self.read(most, kept))


def streamed(path: str, body: Mapping[str, Any], read: Callable[[Mapping[str, str]], AnswerReader]) -> EngineRequest:
    """The request for an answer that is streamed and counted."""
    asked = {"stream_options": {"include_usage": True}, **body, "stream": True}
    return EngineRequest(path, msgspec.json.encode(asked), read)


def is_plain(body: Mapping[str, Any]) -> bool:
    """Whether the answer to a chat or completion is one plain text."""
    if not all(name in _SAMPLING or honoured(name, value) for name, value in body.items()):
        return False
    messages = body.get("messages", ())
    return all(map(_is_plain_message, messages)) and not (messages and messages[-1]["role"] == "assistant")


def _is_plain_message(message: Any) -> bool:
    content = message.get("content")
    texts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    alone = message.get("role") in ROLES and message.get("tool_calls") is None
    return alone and all(isinstance(one, dict) and one.get("type") == "text" for one in texts)


class _Template(msgspec.Struct, frozen=True):
    prompt: str


_decode_template = msgspec.json.Decoder(_Template).decode
