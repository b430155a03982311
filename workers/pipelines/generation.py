"""A prompt in, and out what a small chat model answers: token by token, in batches whose rows end when they like.

A batch is admitted as one; each row that ends is evicted at once, and the others go on without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer

from tasks.catalogue import Model, Variant
from taxiway.errors import InvalidRequestError, RequestTooLargeError
from workers.pipelines import Item, Row
from workers.pipelines.sampling import Sequel, read_wishes
from workers.pipelines.text import read_text
from workers.runtimes import ModelLoadError, Placed, Runtime
from workers.runtimes.stepping import SteppingRuntime

MAX_STOPS = 4

MAX_HELD = 12_288
"""Most tokens of chats and answers that are held at once: they take 46 kB each in float32, 570 MB together."""

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""The system's part of a chat without one of its own, from the chat template inside SmolLM2's GGUF file."""


class ChatTemplate:
    """Wraps a prompt as SmolLM2 was trained to read it. What a prompt spells never becomes a control token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self.ends = frozenset(self._control(name) for name in ("<|im_end|>", "<|endoftext|>"))
        self._before = [*self._part(f"system\n{SYSTEM}"), *self._encode("\n")]
        self._after = [*self._encode("\n"), self._control("<|im_start|>"), *self._encode("assistant\n")]

    def tokens(self, prompt: str) -> list[int]:
        """The whole chat up to where the answer begins."""
        return [*self._before, *self._part(f"user\n{prompt}"), *self._after]

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say."""
        decoded: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return decoded

    def _part(self, text: str) -> list[int]:
        return [self._control("<|im_start|>"), *self._encode(text), self._control("<|im_end|>")]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _control(self, name: str) -> int:
        token: int | None = self._tokenizer.token_to_id(name)
        if token is None:
            raise ModelLoadError(f"the tokenizer has no token {name!r}: it is not SmolLM2's")
        return token


class GenerationPipeline:
    """Reads prompts, then steps the runtime until every row has ended.

    Args:
        model: its first input is the prompt; its last bucket is the most tokens of prompt and answer together.
        template: the chat around a prompt.
    """

    def __init__(self, model: Model, template: ChatTemplate) -> None:
        self._input = model.inputs[0].name
        self._limit = model.buckets[-1]
        self._defaults = {name: parameter.default for name, parameter in model.parameters.items()}
        self._template = template

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """The chat's tokens; the size is theirs and those that the answer may have.

        Raises:
            InvalidRequestError: no prompt, an empty one, one that is not UTF-8, or too many or empty stops.
            RequestTooLargeError: prompt and answer do not fit in the context, or the prompt is over `text.MAX_BYTES`.
        """
        wanted = {**self._defaults, **parameters}
        _check_stops(wanted.get("stop"))
        ids = self._template.tokens(read_text(self._input, row))
        size = len(ids) + int(wanted["max_tokens"])
        if size > self._limit:
            expected = f"at most {self._limit} tokens of chat and max_tokens together"
            message = f"input {self._input!r}: expected {expected}, got {size}"
            raise RequestTooLargeError(message, field=f"inputs.{self._input}", limit=self._limit)
        return Item({"tokens": np.array(ids, np.int64)}, size, wanted)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """`text`, `tokens` and `finish-reason` for each item."""
        stepping = cast(SteppingRuntime, runtime)
        sequels = [Sequel(read_wishes(i.parameters), self._template.ends, self._template.text) for i in items]
        for group in _groups(items):
            _finish(stepping, sequels, group, [items[slot].arrays["tokens"] for slot in group])
        return [{"text": s.text, "tokens": len(s.tokens), "finish-reason": s.finish} for s in sequels]


def _groups(items: Sequence[Item]) -> Iterator[list[int]]:
    """The items' places in order, in groups that hold at most `MAX_HELD` tokens together, or one item."""
    group: list[int] = []
    for slot in range(len(items)):
        if group and max(items[s].size for s in (*group, slot)) * (len(group) + 1) > MAX_HELD:
            yield group
            group = []
        group.append(slot)
    yield group


def _finish(
    runtime: SteppingRuntime, sequels: Sequence[Sequel], slots: list[int], prompts: Sequence[np.ndarray]
) -> None:
    """Admit the slots together, and step those that go on until none does."""
    going = slots
    try:
        logits = runtime.admit(going, prompts)
        while going := _advance(runtime, sequels, going, logits):
            logits = runtime.step(going, [sequels[slot].tokens[-1] for slot in going])
    finally:
        runtime.evict(going)


def _advance(runtime: SteppingRuntime, sequels: Sequence[Sequel], going: list[int], logits: np.ndarray) -> list[int]:
    """Give each going row its logits, evict those that ended, and return the others."""
    for slot, row in zip(going, logits, strict=True):
        sequels[slot].take(row)
    ended = [slot for slot in going if sequels[slot].finish]
    if ended:
        runtime.evict(ended)
    return [slot for slot in going if not sequels[slot].finish]


def _check_stops(stops: Any) -> None:
    if stops and (len(stops) > MAX_STOPS or not all(stops)):
        message = f"parameter 'stop': expected at most {MAX_STOPS} texts, none of them empty, got {stops!r}"
        raise InvalidRequestError(message, field="parameters.stop")


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> GenerationPipeline:
    """The pipeline for one variant, from the file in the role `tokenizer`."""
    return GenerationPipeline(model, ChatTemplate(Tokenizer.from_file(str(placed.files["tokenizer"]))))
