"""Text generation by a small chat model with continuous batching.

Rows join and leave between steps, and each ends on its own: tokens are sampled, and a text's end is detected, for each
sequence independently of its batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from tasks.models.model import Model, Variant
from taxiway.errors import InvalidRequestError, RequestTooLargeError
from workers.pipelines.chat_template import ChatTemplate, open_template
from workers.pipelines.running_batch import RunningBatch
from workers.pipelines.sampling import GeneratedText, read_sampling
from workers.pipelines.text import read_text
from workers.port import Item, Placed, Row, Runtime, SteppingRuntime

MAX_STOPS = 4


class SteppingPipeline:
    """Answers items with the `tokens` of a prompt, in a batch that rows join and leave.

    Args:
        ends: the tokens that end an answer.
        decode: tokens to text.
    """

    def __init__(self, ends: frozenset[int], decode: Callable[[Sequence[int]], str]) -> None:
        self._ends, self._decode = ends, decode

    def begin(self, runtime: Runtime) -> RunningBatch:
        """An empty batch, for items of this pipeline."""
        return RunningBatch(cast(SteppingRuntime, runtime), self._generated)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """The answer of each item, as a `RunningRow` has it. As many run together as memory allows."""
        batch, waiting = self.begin(runtime), deque(items)
        rows = []
        try:
            while waiting or batch.rows:
                while waiting and batch.room(waiting[0].size):
                    rows.append(batch.join(waiting.popleft()))
                for failed in [ended.error for ended in batch.step() if ended.error is not None]:
                    raise failed
        finally:
            batch.leave(batch.rows)
        return [row.answer for row in rows]

    def _generated(self, item: Item) -> GeneratedText:
        return GeneratedText(read_sampling(item.parameters), self._ends, self._decode)


class GenerationPipeline(SteppingPipeline):
    """Tokenises prompts and generates answers in a running batch.

    Args:
        model: its first input is the prompt; its last bucket is the most tokens of prompt and answer in total.
        template: makes a chat of a prompt.
    """

    def __init__(self, model: Model, template: ChatTemplate) -> None:
        super().__init__(template.ends, template.text)
        self._input = model.inputs[0].name
        self._limit = model.buckets[-1]
        self._defaults = {name: parameter.default for name, parameter in model.parameters.items()}
        self._template = template

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """The chat's tokens; the size is their number plus the answer's limit.

        Raises:
            InvalidRequestError: the prompt is missing, empty or not UTF-8, or there are too many or empty stops.
            RequestTooLargeError: prompt and answer exceed the context, or the prompt exceeds `text.MAX_BYTES`.
        """
        wanted = {**self._defaults, **parameters}
        _check_stops(wanted.get("stop"))
        ids = self._template.tokens([{"role": "user", "content": read_text(self._input, row)}])
        size = len(ids) + int(wanted["max_tokens"])
        if size > self._limit:
            expected = f"at most {self._limit} tokens of chat and max_tokens together"
            message = f"input {self._input!r}: expected {expected}, got {size}"
            raise RequestTooLargeError(message, field=f"inputs.{self._input}", limit=self._limit)
        return Item({"tokens": np.array(ids, np.int64)}, size, wanted)


def _check_stops(stops: Any) -> None:
    if stops and (len(stops) > MAX_STOPS or not all(stops)):
        message = f"parameter 'stop': expected at most {MAX_STOPS} texts, none of them empty, got {stops!r}"
        raise InvalidRequestError(message, field="parameters.stop")


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> GenerationPipeline:
    """The pipeline for one variant, from the files in the roles `tokenizer` and `chat`."""
    return GenerationPipeline(model, open_template(placed))
