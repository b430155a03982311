"""A sentence encoder: the embedding of a text, or a label if the variant has a head.

The graph takes `input_ids` and `attention_mask`, int64 (batch, tokens), and gives `sentence_embedding`, float32
(batch, width). The head is linear over the embedding: `weight` (labels, width) and `bias` (labels).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from tasks.models.model import Model, Variant
from taxiway.errors import RequestTooLargeError, flaw, invalid
from workers.port import Arrays, Item, Placed, Row, Runtime

LABELS = ("negative", "positive")
"""The head's classes, in order."""

MAX_BYTES = 64 * 2**10
"""The largest text in UTF-8 bytes. A larger one is refused; one of more tokens than the last bucket is truncated."""


class TextPipeline:
    """Tokenises texts, pads a batch to a common length, and reads the graph's embeddings.

    Args:
        model: its first input is the text; its last bucket is the maximum number of tokens.
        tokenizer: its padding and truncation are replaced.
        lengths: token counts to pad to, ascending, for a runtime that compiles per shape; otherwise a batch is as long
            as its longest text.
        head: `weight` and `bias` of a classifier; empty for embeddings.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, lengths: Sequence[int], head: Arrays) -> None:
        self._input = model.inputs[0].name
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(model.buckets[-1])
        self._lengths = lengths
        self._head = head

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        """The text's tokens; its size is their number.

        Raises:
            InvalidRequestError: the text is missing, empty or not UTF-8.
            RequestTooLargeError: the text exceeds `MAX_BYTES`.
        """
        ids = self._tokenizer.encode(read_text(self._input, row)).ids
        return Item({"input_ids": np.array(ids, np.int64)}, len(ids), parameters)

    def run(self, runtime: Runtime, items: Sequence[Item]) -> list[Row]:
        """`embedding` for each item, or `label` and `score` with a head."""
        outputs = runtime.run(self._pad([item.arrays["input_ids"] for item in items]))
        embeddings = outputs["sentence_embedding"]
        if self._head:
            return _classify(embeddings, self._head)
        return [{"embedding": embedding} for embedding in embeddings]

    def _pad(self, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        longest = max(len(row) for row in rows)
        length = self._lengths[bisect_left(self._lengths, longest)] if self._lengths else longest
        ids = np.zeros((len(rows), length), np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}


def read_text(name: str, row: Row) -> str:
    """The row's text for the input `name`.

    Raises:
        InvalidRequestError: it is missing, empty or not UTF-8.
        RequestTooLargeError: the text exceeds `MAX_BYTES`.
    """
    field = f"inputs.{name}"
    value = row.get(name)
    if not isinstance(value, str | bytes):
        raise invalid(field, "text", type(value).__name__)
    try:
        text, size = (value, len(value.encode())) if isinstance(value, str) else (value.decode(), len(value))
    except UnicodeError as error:
        raise invalid(field, "UTF-8", flaw(error)) from error
    if size > MAX_BYTES:
        message = f"{field}: expected at most {MAX_BYTES} bytes of text, got {size}"
        raise RequestTooLargeError(message, field=field, limit=MAX_BYTES)
    if not text.strip():
        raise invalid(field, "a text that is not empty")
    return text


def _classify(embeddings: np.ndarray, head: Arrays) -> list[Row]:
    logits = embeddings @ head["weight"].T + head["bias"]
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = raised / raised.sum(axis=1, keepdims=True)
    best = shares.argmax(axis=1)
    return [{"label": LABELS[label], "score": float(share[label])} for label, share in zip(best, shares, strict=True)]


def open_pipeline(model: Model, variant: Variant, placed: Placed) -> TextPipeline:
    """The pipeline for one variant, from the files in the roles `tokenizer` and, for a classifier, `head`."""
    tokenizer = Tokenizer.from_file(str(placed.files["tokenizer"]))
    head = load_file(placed.files["head"]) if "head" in placed.files else {}
    return TextPipeline(model, tokenizer, model.buckets if variant.runtime == "jax" else (), head)
