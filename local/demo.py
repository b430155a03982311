"""The demo: starts a fleet, runs real models on real inputs on three hardware classes, and stops it.

It submits the catalogue's own examples, with mixed service terms. An example in a model.yaml is a plain input, or a
mapping with `inputs` and optional `parameters`. An input `{artefact: photo-1}` stands for that artefact's bytes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from local.artefacts import Wanted
from local.fleet import LocalFleet, stop_fleet
from local.supervisor import ended_with, in_tree, own_command
from tasks.models.artefacts import ArtefactStore
from tasks.models.catalogue import Catalogue
from tasks.models.model import Model
from tasks.topology import Topology
from taxiway import AsyncClient, Result
from taxiway.errors import OverloadedError, TaxiwayError

ANSWERED_WITHIN = 120.0
"""Seconds within which every answer must arrive."""

DEMO_COUNTS = {"cpu.batch": 1}
"""Workers of the demo's fleet if not one per device: three classes share the cores of a laptop."""

EXAMPLES = 5
"""Answers that are shown with their reasons."""

FEWEST_INPUTS = 60
"""Minimum number of inputs: the quick models' examples are repeated until there are that many."""

_ATTEMPTS = 20
_RETRY_AFTER = 0.5  # seconds, if an overloaded fleet does not specify it


class DemoAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One input and its result; `elapsed` is seconds from submission to answer as the caller measured it.

    `error` is empty if there is a result.
    """

    ask: DemoInput
    elapsed: float
    result: Result | None = None
    error: str = ""


def contrasts(answers: Sequence[DemoAnswer], most: int = EXAMPLES) -> list[DemoAnswer]:
    """Up to `most` different answers: one per model and class, models that ran on several classes first."""
    models: dict[str, dict[str, DemoAnswer]] = {}
    for answer in answers:
        if answer.result is not None:
            models.setdefault(answer.ask.model, {}).setdefault(answer.result.report.hardware_class, answer)
    ranked = sorted(models.items(), key=lambda one: (-len(one[1]), one[0]))
    return [answer for _, classes in ranked for _, answer in sorted(classes.items())][:most]


def plain(answer: DemoAnswer) -> dict[str, Any]:
    """An answer in plain values; embeddings and the like are kept in full."""
    row: dict[str, Any] = {"model": answer.ask.model, "input": answer.ask.shown, "terms": dict(answer.ask.terms)}
    row |= {"elapsed": answer.elapsed, "error": answer.error}
    if answer.result is None:
        return row
    row["outputs"] = answer.result.outputs
    row.update(msgspec.to_builtins(answer.result.report))
    return row


@contextmanager
def demo_fleet(emulate: Collection[str], console: Console) -> Iterator[LocalFleet]:
    """A fleet with one CPU worker, each class of `emulate` on the CPU, and Flower, in a directory of its own.

    It is always stopped; the directory is kept only after a failure, for its logs.

    Raises:
        CommandError: the fleet did not start.
    """
    data = Path(tempfile.mkdtemp(prefix="taxiway-demo-"))
    try:
        with console.status("starting the broker, a router, workers and Flower"):
            fleet = _start(data, emulate)
        try:
            yield fleet
        finally:
            with console.status("stopping the fleet"):
                stop_fleet(data)
    except BaseException:
        console.print(f"the logs are in {data / 'logs'}")
        raise
    shutil.rmtree(data)


def _start(data: Path, emulate: Collection[str]) -> LocalFleet:
    command = own_command("up", "--data", str(data), "--detach", "--json", "--no-fetch")
    command += [word for name, count in DEMO_COUNTS.items() for word in ("--workers", f"{name}={count}")]
    command += [word for name in emulate for word in ("--emulate", name)]
    started = subprocess.run(command, env=in_tree(os.environ), capture_output=True, check=False, text=True)
    if started.returncode != 0:
        raise ended_with(started.stderr, started.returncode)
    return msgspec.json.decode(started.stdout, type=LocalFleet)


async def answer_all(url: str, asks: Sequence[DemoInput], console: Console) -> list[DemoAnswer]:
    """Submit everything at once and wait for every answer, showing the progress on `console`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        names = dict.fromkeys(ask.model for ask in asks)
        rows = {name: bars.add_task(name, total=sum(ask.model == name for ask in asks)) for name in names}
        async with AsyncClient(url) as client:
            return await asyncio.gather(
                *(_answer(client, ask, lambda model: bars.advance(rows[model])) for ask in asks)
            )


async def _answer(client: AsyncClient, ask: DemoInput, done: Callable[[str], None]) -> DemoAnswer:
    begun = time.monotonic()
    try:
        result = await _patiently(lambda: _infer(client, ask))
    except TaxiwayError as error:
        return DemoAnswer(ask=ask, elapsed=time.monotonic() - begun, error=f"{type(error).__name__}: {error}")
    done(ask.model)
    return DemoAnswer(ask=ask, elapsed=time.monotonic() - begun, result=result)


async def _infer(client: AsyncClient, ask: DemoInput) -> Result:
    return await client.infer(ask.model, ask.inputs, parameters=ask.parameters, timeout=ANSWERED_WITHIN, **ask.terms)


async def _patiently(infer: Callable[[], Awaitable[Result]]) -> Result:
    """The answer; an overloaded fleet is retried after the delay it asked for."""
    for _ in range(_ATTEMPTS):
        try:
            return await infer()
        except OverloadedError as full:
            await asyncio.sleep(full.retry_after or _RETRY_AFTER)
    return await infer()


_LIVE = {"service": "live", "deadline": 45.0}
_EASY = {"service": "standard", "deadline": 45.0}
_BULK = {"service": "bulk"}
_IN_THE_CLOUD = {"service": "standard", "deadline": 45.0, "locality": "cloud"}
_IN_THE_LAB = {"service": "bulk", "locality": "lab"}
# Deadlines are looser than the services' own if requests wait behind slow models: four classes may share two cores.
# Some data may only be in one place, so that each class has work on any machine, however fast.

SERVICES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "generate": (_LIVE, _EASY, _EASY),
    "chat": (_EASY,),
    "ising": (_BULK,),
    "classify-image": (_LIVE, _IN_THE_CLOUD, _EASY, _BULK),
    "embed": (_EASY, _BULK, _IN_THE_LAB),
    "sentiment": (_LIVE, _EASY),
}
"""The demo's models with their terms, slowest first: their work is queued when the quick requests are placed."""


@dataclass(frozen=True, slots=True)
class DemoInput:
    """One input of the demo: `shown` is its text for people, `terms` are its service terms."""

    model: str
    shown: str
    inputs: Any
    parameters: Mapping[str, Any]
    terms: Mapping[str, Any]


def artefacts_of_examples(catalogue: Catalogue) -> list[Wanted]:
    """The artefacts that the demo uses as inputs."""
    models = [catalogue.resolve(name) for name in SERVICES]
    return [(m, reference) for m in models for e in m.examples if (reference := _artefact(_inputs(e))) is not None]


def left_out_models(fleet: LocalFleet, topology: Topology) -> dict[str, str]:
    """The demo's models that only an engine serves which is not started here, and why it is not."""
    out = [(topology.hardware[name].endpoint, why) for name, why in fleet.left_out.items()]
    return {
        model: why for endpoint, why in out if endpoint is not None for model in endpoint.models if model in SERVICES
    }


def asks(catalogue: Catalogue, cache: Path, skipped: Collection[str] = ()) -> list[DemoInput]:
    """The demo's requests except to `skipped` models, slow models first; at least `FEWEST_INPUTS` of them."""
    store = ArtefactStore(cache)
    models = [catalogue.resolve(name) for name in SERVICES if name not in skipped]
    quick = models[-1]
    others = [ask for model in models[:-1] for ask in islice(_asks(model, store), len(model.examples))]
    return [*others, *islice(_asks(quick, store), max(len(quick.examples), FEWEST_INPUTS - len(others)))]


def _asks(model: Model, store: ArtefactStore) -> Iterator[DemoInput]:
    """A request for each example, repeated indefinitely, each with the model's next terms."""
    for example, terms in zip(cycle(model.examples), cycle(SERVICES[model.name]), strict=False):
        inputs = _inputs(example)
        yield DemoInput(
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
