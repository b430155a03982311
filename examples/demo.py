"""`python -m examples.demo`: starts a fleet, runs real models on real inputs on three hardware classes, and stops it.

It submits the catalogue's own examples, with mixed service terms. An example in a model.yaml is a plain input, or a
mapping with `inputs` and optional `parameters`. An input `{artefact: photo-1}` stands for that artefact's bytes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from local.__main__ import exit_from, fetch_for
from local.artefacts import Wanted, fetch
from local.fleet import LocalFleet, stop_fleet
from local.plan import absent, plan_fleet
from local.supervisor import ended_with, in_tree, own_command
from tasks.machine import Machine, look
from tasks.models.artefacts import ArtefactStore
from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.settings import cache_directory, models_folder, queues_file
from tasks.topology import Topology, load_topology
from taxiway import AsyncClient, Result
from taxiway.cli.address import print_json
from taxiway.cli.show import brief, duration
from taxiway.contract.job import RunReport
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


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--rows", is_flag=True, help="Show every input, not only a summary and some examples.")
def main(*, as_json: bool, rows: bool) -> None:
    """Start a fleet, run real models on real inputs on every hardware class, and stop it."""
    console = Console(stderr=True)
    topology, machine, catalogue = (
        load_topology(queues_file(os.environ)),
        look(),
        load_catalogue(models_folder(os.environ)),
    )
    emulated = absent(topology, machine)
    cache = cache_directory(os.environ)
    fetch_for(plan_fleet(topology, machine, emulate=emulated, counts=DEMO_COUNTS), topology)
    for error in fetch(artefacts_of_examples(catalogue), cache, console):
        raise error
    with demo_fleet(emulated, console) as fleet:
        skipped = left_out_models(fleet, topology)
        answers = asyncio.run(answer_all(fleet.broker, asks(catalogue, cache, skipped), console))
    if as_json:
        print_json({"answers": list(map(plain, answers)), "supervisor": fleet.pid})
    else:
        show_answers(answers, machine, _screen(), every=rows)
    for name, why in skipped.items():
        console.print(f"{name} took no part: {why}", highlight=False)
    if any(answer.result is None for answer in answers):
        sys.exit(1)


_SCREEN = 100  # columns that the demo's answers fit, also in a file
_INPUT_WIDTH = 60  # characters of an example's input
_ANSWER_WIDTH = 40  # and of its answer


def show_answers(answers: Sequence[DemoAnswer], machine: Machine, console: Console, *, every: bool = False) -> None:
    """A summary of the demo: a line per class and model, some answers with their reasons, and what is emulated."""
    results = [answer for answer in answers if answer.result is not None]
    console.print(_summary(answers))
    for answer in results if every else contrasts(results):
        console.print()
        for text, style in zip(_example(answer), ("bold", "", "dim"), strict=True):
            console.print(Padding(Text(text, style, overflow="fold"), (0, 0, 0, 0 if style == "bold" else 2)))
    console.print()
    _show_totals(answers, console)
    emulated = Counter(a.result.report.hardware_class for a in results if a.result and a.result.report.emulated)
    if emulated:
        console.print(_emulation(emulated), highlight=False)
    if "torch" not in machine.runtimes:
        console.print("torch is not installed, so none of its variants took part: `make torch` adds it.")


def _screen() -> Console:
    """A console on stdout, also as wide as a screen if that is not a terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_SCREEN)


def _summary(answers: Sequence[DemoAnswer]) -> Table:
    """A line for each class, model and variant that answered: medians of seconds, and the mean cost."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("class", "model", "variant"):
        table.add_column(name, no_wrap=True)
    for name in ("answers", "waited", "ran", "in all", "USD per 1,000"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[tuple[RunReport, float]]] = {}
    for answer in answers:
        if answer.result is not None:
            report = answer.result.report
            name = f"{report.hardware_class} (emulated)" if report.emulated else report.hardware_class
            groups.setdefault((name, answer.ask.model, report.variant), []).append((report, answer.elapsed))
    for names, group in sorted(groups.items()):
        waited, ran = (median(getattr(one, part) for one, _ in group) for part in ("queue_wait", "run_time"))
        times = map(duration, (waited, ran, median(elapsed for _, elapsed in group)))
        cost = mean(one.cost for one, _ in group)
        table.add_row(*names, str(len(group)), *times, f"{cost * 1000:.2g}")
    return table


def _example(answer: DemoAnswer) -> tuple[str, str, str]:
    """Three lines: an input with its terms, its answer with where and how fast it ran, and why there."""
    assert answer.result is not None
    report, terms = answer.result.report, dict(answer.ask.terms)
    asked = [str(terms.pop("service"))]
    asked += [f"{name} {f'{value:g} s' if name == 'deadline' else value}" for name, value in terms.items()]
    where = f"{report.hardware_class}/{report.variant}" + (" (emulated)" if report.emulated else "")
    shown = _shorten(_shown(answer.result.outputs), _ANSWER_WIDTH)
    return (
        f"{answer.ask.model} ({', '.join(asked)}): {_shorten(answer.ask.shown, _INPUT_WIDTH)}",
        f"→ {shown}   {where}, {duration(answer.elapsed)}",
        f"because: {report.reason}",
    )


def _emulation(emulated: Mapping[str, int]) -> str:
    """What the answers of emulated classes show, and what they do not."""
    classes = " and ".join(sorted(emulated))
    return (
        f"{sum(emulated.values())} of them, on {classes}, are emulated: this machine has no such device, so its CPU "
        "answered, at its own speed and at the class's price. They show where requests run and why, not how fast the "
        "device is."
    )


def _shorten(text: str, most: int) -> str:
    """The text in one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _shown(outputs: Mapping[str, Any]) -> str:
    """An answer in one line: a label with its score, else its first output."""
    return brief(outputs if "label" in outputs else next(iter(outputs.values()))).replace("\n", " ")


def _show_totals(answers: Sequence[DemoAnswer], console: Console) -> None:
    results = [answer.result for answer in answers if answer.result is not None]
    classes = Counter(result.report.hardware_class for result in results)
    where = ", ".join(f"{count} on {name}" for name, count in sorted(classes.items()))
    cost = sum(result.report.cost for result in results)
    console.print(f"{len(results)} of {len(answers)} inputs answered for ${cost:.3g}: {where}", highlight=False)
    for answer in answers:
        if answer.result is None:
            console.print(escape(f"failed: {answer.ask.model}: {answer.ask.shown}: {answer.error}"), style="red")


if __name__ == "__main__":
    exit_from(main, "python -m examples.demo")
