"""What the demo asks for: the catalogue's own examples, under mixed service levels.

An example in a model.yaml is a plain input, or a mapping with `inputs` and, if need be, `parameters`. An input
`{artefact: photo-1}` stands for that artefact's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from local.fetch import Wanted
from tasks.models.artefacts import ArtefactStore
from tasks.models.catalogue import Catalogue, Model

LEAST = 60
"""Inputs that a demo has at the least; the quick models' examples come again until there are so many."""

_LIVE = {"service": "live", "deadline": 45.0}
_EASY = {"service": "standard", "deadline": 45.0}
_BULK = {"service": "bulk"}
_IN_THE_CLOUD = {"service": "standard", "deadline": 45.0, "locality": "cloud"}
_IN_THE_LAB = {"service": "bulk", "locality": "lab"}
# Looser deadlines than the services' own where requests wait behind text generation: three classes may share two cores.
# And data that may only be in one place, so that each class has work on any machine, however fast.

SERVICES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "generate": (_LIVE, _EASY, _EASY, _IN_THE_CLOUD),
    "monte-carlo": (_BULK,),
    "classify-image": (_LIVE, _EASY, _BULK),
    "embed": (_EASY, _BULK, _IN_THE_LAB),
    "sentiment": (_LIVE, _EASY),
}
"""The demo's models with their terms, slowest first: their work is queued when the quick requests are placed."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One input of the demo: `shown` is what a person reads of it, `terms` how much it matters."""

    model: str
    shown: str
    inputs: Any
    parameters: Mapping[str, Any]
    terms: Mapping[str, Any]


def artefacts_of_examples(catalogue: Catalogue) -> list[Wanted]:
    """The artefacts that the demo's inputs are."""
    models = [catalogue.resolve(name) for name in SERVICES]
    return [(m, reference) for m in models for e in m.examples if (reference := _artefact(_inputs(e))) is not None]


def asks(catalogue: Catalogue, cache: Path) -> list[Ask]:
    """The demo's requests, slow models first; at least `LEAST` of them."""
    store = ArtefactStore(cache)
    models = [catalogue.resolve(name) for name in SERVICES]
    quick = models[-1]
    others = [ask for model in models[:-1] for ask in islice(_asks(model, store), len(model.examples))]
    return [*others, *islice(_asks(quick, store), max(len(quick.examples), LEAST - len(others)))]


def _asks(model: Model, store: ArtefactStore) -> Iterator[Ask]:
    """A request for each example, over and over, each under the model's next terms."""
    for example, terms in zip(cycle(model.examples), cycle(SERVICES[model.name]), strict=False):
        inputs = _inputs(example)
        yield Ask(
            model=model.name,
            shown=_artefact(inputs) or str(inputs),
            inputs=store.example(model, example),
            parameters=example.get("parameters", {}) if isinstance(example, dict) else {},
            terms=terms,
        )


def _inputs(example: Any) -> Any:
    return example["inputs"] if isinstance(example, dict) and set(example) <= {"inputs", "parameters"} else example


def _artefact(inputs: Any) -> str | None:
    """The artefact that an input stands for; None for a plain value."""
    return inputs["artefact"] if isinstance(inputs, dict) and set(inputs) == {"artefact"} else None
