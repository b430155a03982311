"""Makes rows of a wanted size for each kind of pipeline, from a model's own examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.models.artefacts import ArtefactStore
from tasks.models.catalogue import Model
from tasks.models.signature import bind
from tasks.models.sizes import unit_of
from workers.pipelines import Item, Pipeline, Row

_WORDS = ("a", "quiet", "harbour", "town", "wakes", "slowly", "while", "ferries", "leave", "for", "the", "islands", ".")

_LONG_ANSWER = "Write a very long story about a lighthouse keeper, with many details, and do not stop."

_ANSWER_SHARE = 0.5
"""Of a generation's size, what the answer has: the rest is the chat with its prompt."""


class SizeError(Exception):
    """No row of that size can be made for the model."""


class Samples:
    """Rows for one model, prepared by its pipeline."""

    def __init__(self, model: Model, pipeline: Pipeline, artefacts: ArtefactStore) -> None:
        self._model = model
        self._pipeline = pipeline
        self._artefacts = artefacts

    def item(self, size: int) -> Item:
        """A row of the size, or of the nearest that the model allows.

        Raises:
            SizeError: the model has no example to make one from.
        """
        if self._model.pipeline == "text":
            return self._largest(size, {})
        if self._model.pipeline == "generation":
            return self._generation(size)
        return self._from_example(size)

    def _prepared(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        return self._pipeline.prepare(row, parameters)

    def _generation(self, size: int) -> Item:
        """A prompt that asks for a long answer, lengthened to the size; half of it is for the answer."""
        bare = self._prepared(self._words(0, _LONG_ANSWER), {"max_tokens": 1}).size - 1
        answer = max(1, min(int(size * _ANSWER_SHARE), size - bare))
        return self._largest(size, {"max_tokens": answer}, _LONG_ANSWER)

    def _largest(self, size: int, parameters: Mapping[str, Any], end: str = "") -> Item:
        """The row of most words before `end` that is no larger than the size; with none at least it has `end`."""
        low, high = 0 if end else 1, size
        while low < high:
            middle = (low + high + 1) // 2
            if self._prepared(self._words(middle, end), parameters).size <= size:
                low = middle
            else:
                high = middle - 1
        return self._prepared(self._words(low, end), parameters)

    def _words(self, count: int, end: str) -> Row:
        words = " ".join(_WORDS[i % len(_WORDS)] for i in range(count))
        return {self._model.inputs[0].name: f"{words} {end}".strip()}

    def _from_example(self, size: int) -> Item:
        if not self._model.examples:
            raise SizeError(f"{self._model.id} has no example to measure with")
        inputs = self._artefacts.example(self._model, self._model.examples[0])
        row = dict(bind(self._model, inputs, {}).rows[0])
        unit = unit_of(self._model)
        return self._prepared(row | {unit.name: size} if unit.kind == "value" else row, {})
