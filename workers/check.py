"""`python -m workers.check`: says what is wrong with queues.yaml and the models, and with `--run`, whether they answer.

Exit status 1 where anything is an error.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.check import QUEUES, CheckVerdict, check_configuration
from tasks.document import written_out
from tasks.models.artefacts import ArtefactError, ArtefactStore
from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.models.signature import bind
from tasks.settings import cache_directory, models_folder, queues_file
from tasks.topology import load_topology
from taxiway.cli.fleet import run
from taxiway.cli.show import stdout_console
from taxiway.contract.values import to_wire
from taxiway.errors import TaxiwayError
from workers.device import Device, find_device, unfit
from workers.executor import Executor, briefest, most_rows
from workers.learned import Loaded
from workers.port import Item
from workers.profiling.measure import bench_class

ROWS = 2
"""Rows that run together, if the variant allows it: a graph that takes only one row fails on them."""

_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command()
@click.option("--models", type=click.Path(path_type=Path), metavar="DIR", help="Models' folders [TAXIWAY_MODELS].")
@click.option("--queues", type=click.Path(path_type=Path), metavar="FILE", help="queues.yaml [TAXIWAY_QUEUES].")
@click.option("--run", "running", is_flag=True, help="Run an example of each variant too; weights are fetched.")
@click.option("--show", is_flag=True, help="Print queues.yaml with every default, if it is valid.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def main(models: Path | None, queues: Path | None, *, running: bool, show: bool, as_json: bool) -> None:
    """Check queues.yaml and the models.

    Exits with 1 if anything is wrong. `taxiway up` runs the same checks first, without --run.

    With --run weights are fetched, and each variant that this machine's CPU can run answers an example, in the worker's
    own pipeline and runtime: model.yaml's first.
    """
    logging.disable(logging.CRITICAL)  # the verdicts say it
    models, queues = (models or models_folder(os.environ)).absolute(), queues or queues_file(os.environ)
    verdicts = check_configuration(queues, models, os.environ)
    if show and not any(verdict.subject == QUEUES and verdict.level == "error" for verdict in verdicts):
        click.echo(written_out(load_topology(queues)), nl=False)
        return
    if running:
        failed = {verdict.subject for verdict in verdicts if verdict.level == "error"}
        with Console(stderr=True).status("models answer their examples"):
            verdicts += run_examples(load_catalogue(models), cache_directory(os.environ), leaving_out=failed)
    if as_json:
        click.echo(msgspec.json.encode({"verdicts": verdicts}))
    else:
        _show(verdicts)
    sys.exit(1 if any(verdict.level == "error" for verdict in verdicts) else 0)


def run_examples(catalogue: Catalogue, cache: Path, *, leaving_out: set[str]) -> Iterator[CheckVerdict]:
    """Whether each variant answers an example on this machine's CPU; those of `leaving_out` are not run."""
    device = find_device(bench_class("cpu"), "cpu:0", emulate=False)
    for _, model in sorted(catalogue.models.items()):
        for name in sorted(model.variants):
            subject = f"{model.id}/{name}"
            if subject not in leaving_out:
                yield _run(model, name, device, ArtefactStore(cache))


def _run(model: Model, name: str, device: Device, artefacts: ArtefactStore) -> CheckVerdict:
    subject = f"{model.id}/{name}"
    if reason := unfit(model.variants[name], device):
        return CheckVerdict(subject=subject, level="ok", text=f"not run here: {reason}")
    if not model.examples:
        hint = "give it `examples` that it can answer"
        return CheckVerdict(subject=subject, level="warning", text="not run: model.yaml has no examples", hint=hint)
    executor = Executor(bench_class("cpu", ROWS), device, artefacts, threads=1)
    try:
        loaded = executor.load(model, name)
        text = _answer(executor, loaded, artefacts)
    except (TaxiwayError, ArtefactError) as error:
        return CheckVerdict(subject=subject, level="error", text=str(error))
    finally:
        for one in executor.all_loaded():
            one.runtime.unload()
    return CheckVerdict(subject=subject, level="ok", text=text)


def _answer(executor: Executor, loaded: Loaded, artefacts: ArtefactStore) -> str:
    """What running the example showed.

    Raises:
        TaxiwayError: it failed, or an answer has no form on the wire.
    """
    model = loaded.model
    bound = bind(model, artefacts.example(model, model.examples[0]), briefest(model))
    rows = most_rows(executor.hardware, loaded.variant)
    items: list[Item] = [loaded.pipeline.prepare(bound.rows[0], bound.parameters) for _ in range(rows)]
    began = time.perf_counter()
    answers: list[Any] = executor.run(loaded, items)
    seconds = time.perf_counter() - began
    for answer in answers:
        if isinstance(answer, TaxiwayError):
            raise answer
        for spec in model.outputs:
            to_wire(answer[spec.name], spec.name)
    return f"its example was answered in {seconds:.3g} s, {rows} at once"


def _show(verdicts: Sequence[CheckVerdict]) -> None:
    console = stdout_console()
    table = Table("level", "what", "found", box=None, pad_edge=False)
    for verdict in verdicts:
        style = _STYLES[verdict.level]
        hint = f"\n[cyan]hint:[/] {escape(verdict.hint)}" if verdict.hint else ""
        table.add_row(f"[{style}]{verdict.level}[/]", escape(verdict.subject), f"{escape(verdict.text)}{hint}")
    console.print(table)
    levels = [verdict.level for verdict in verdicts]
    counts = {level: levels.count(level) for level in ("error", "warning")}
    console.print(", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items()))


if __name__ == "__main__":
    run(main, "python -m workers.check")
