"""`python -m workers.profiling`: measures variants on this machine and writes a profile file for each model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import click
import msgspec

from tasks.document import DocumentError
from tasks.heartbeat import variant_key
from tasks.models.catalogue import Catalogue
from tasks.models.folder import load_catalogue
from tasks.models.model import Model
from tasks.models.profiles import Processor
from tasks.settings import models_folder, queues_file
from tasks.topology import DeviceKind, load_topology
from taxiway.cli import MISSING, USAGE, report
from taxiway.cli.fleet import run
from taxiway.cli.show import stdout_console
from taxiway.errors import ModelUnavailableError, UnknownModelError, flaw
from workers.device import Device, DeviceMissingError, find_device, unfit
from workers.profiling.fit import FULL_BUDGET, QUICK_BUDGET, RunBudget
from workers.profiling.measure import MeasuredOutcome, bench_class, measured_outcome, show, write

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
"""The environment of a worker with one thread (`workers.__main__`)."""


def _outcomes(
    chosen: Sequence[tuple[Model, str]], device: Device, max_rows: int, plan: RunBudget
) -> Iterator[MeasuredOutcome]:
    """What was found of each variant; stderr says which one runs."""
    for number, (model, name) in enumerate(chosen, 1):
        click.echo(f"{number} of {len(chosen)}: {variant_key(model.id, name)}", err=True)
        if reason := unfit(model.variants[name], device):
            yield MeasuredOutcome(model=model.id, variant=name, skipped=reason)
            continue
        with ProcessPoolExecutor(1, get_context("spawn"), os.dup2, (2, 1)) as process:  # runtimes may print lines
            try:
                yield process.submit(measured_outcome, model, name, device, max_rows, plan).result()
            except BrokenProcessPool:
                yield MeasuredOutcome(model=model.id, variant=name, error="its process exited without a result")


@click.command()
@click.option("--model", "names", multiple=True, metavar="NAME", help="Model to measure; may be repeated [all].")
@click.option("--variant", "variants", multiple=True, metavar="NAME", help="Variant to measure; may be repeated [all].")
@click.option("--device", default="cpu:0", metavar="DEVICE", help="cpu:0, cuda:0 or tpu:0.", show_default=True)
@click.option("--quick", is_flag=True, help="About 12 seconds a variant instead of 60.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the models [models/].")
def main(
    names: Sequence[str], variants: Sequence[str], device: str, *, quick: bool, as_json: bool, output: Path | None
) -> None:
    """Measure how models run on this machine: load time, memory, and latency over batch and size.

    Writes MODEL/profiles/DEVICE.yaml, which placement reads. Each variant is measured in a separate process. Run
    nothing else on the machine meanwhile.
    """
    root = models_folder(os.environ).absolute()
    folder = output or root
    try:  # before minutes of measuring
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"{folder}: {flaw(error)}", param_hint="--output") from error
    try:
        chosen = _variants(_models(load_catalogue(root), names), variants)
        found = find_device(bench_class(_kind(device)), device, emulate=False)
        os.environ.update(_ONE_THREAD)
        outcomes = [*_outcomes(chosen, found, _max_rows(found.kind), QUICK_BUDGET if quick else FULL_BUDGET)]
    except (DocumentError, ModelUnavailableError, UnknownModelError, click.BadParameter) as error:
        report(str(error), "")
        sys.exit(USAGE)
    except DeviceMissingError as error:
        report(str(error), "")
        sys.exit(MISSING)
    processor = Processor(kind=found.kind, name=found.name)
    files = write(outcomes, processor, folder)
    if as_json:
        click.echo(msgspec.json.encode({"files": [str(f) for f in files], "variants": outcomes}, enc_hook=int))
    else:
        show(outcomes, files, processor, stdout_console())
    sys.exit(1 if any(outcome.error for outcome in outcomes) else 0)


def _kind(device: str) -> Literal["cpu", "cuda", "tpu"]:
    """The device's kind by its label."""
    kinds: dict[str, Literal["cpu", "cuda", "tpu"]] = {"cpu": "cpu", "cuda": "cuda", "tpu": "tpu"}
    if (kind := kinds.get(device.partition(":")[0])) is None:
        raise click.BadParameter(f"--device: expected cpu:0, cuda:0 or tpu:0, got {device!r}")
    return kind


def _models(catalogue: Catalogue, names: Sequence[str]) -> list[Model]:
    """The named models, or the current version of every model."""
    if names:
        return list({model.id: model for model in map(catalogue.resolve, names)}.values())
    bare = sorted({model.name for model in catalogue.models.values()})
    return [catalogue.resolve(name) for name in bare]


def _variants(models: Sequence[Model], names: Sequence[str]) -> list[tuple[Model, str]]:
    """The variants of these names, or all.

    Raises:
        BadParameter: no model has a variant of a given name.
    """
    known = {name for model in models for name in model.variants}
    for name in names:
        if name not in known:
            raise click.BadParameter(f"--variant: expected one of {sorted(known)}, got {name!r}")
    return [(model, name) for model in models for name in sorted(model.variants) if not names or name in names]


def _max_rows(kind: DeviceKind) -> int:
    """The largest batch of the classes of this kind of device."""
    topology = load_topology(queues_file(os.environ))
    return max((h.max_batch for h in topology.hardware.values() if h.device == kind), default=32)


if __name__ == "__main__":
    run(main, "python -m workers.profiling")
