"""Measures one variant in a process started only for it, so that all its memory is the variant's.

Says on stdout, as JSON lines, how far it is, and at last the measurement or why there is none.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import click
import msgspec
import psutil

from tasks.document import Size
from tasks.machine import RUNTIMES, version_of
from tasks.models.artefacts import ArtefactError, ArtefactStore
from tasks.models.catalogue import Model, load_catalogue
from tasks.models.lengths import ran_size
from tasks.models.profiles import Measurement, Point
from tasks.settings import cache_directory
from tasks.topology import HardwareClass, Price
from taxiway.errors import TaxiwayError
from workers.device import Device, DeviceMissingError, find_device, memory_free
from workers.executor import Executor, Loaded
from workers.pipelines import Item, Row
from workers.profiling.calm import Run, calmest, timed
from workers.profiling.fit import Timed, fit, residuals, rounded
from workers.profiling.grid import FULL, QUICK, Plan, grid, repeats
from workers.profiling.samples import Samples, SizeError
from workers.runtimes import ModelLoadError, import_runtime

_CORNERS = 4  # points of the grid that are timed even when the budget is spent: without them a curve extrapolates

_WARM = 1.1
"""A first run up to this multiple of the second was warm already."""

Progress = Any
"""Called with points done, points in all, and what comes next."""


class Said(msgspec.Struct, omit_defaults=True):
    """One line of what the process says."""

    done: int = 0
    of: int = 0
    next: str = ""
    measurement: Measurement | None = None
    error: str = ""


class Subject:
    """One variant on one device, loaded by the worker's own executor."""

    def __init__(self, model: Model, variant: str, device: Device, artefacts: ArtefactStore, max_rows: int) -> None:
        described = model.variants[variant]
        hardware = HardwareClass(
            device=device.kind,
            runtimes=(described.runtime,),
            max_batch=max_rows,
            max_wait=0.0,
            price=Price(usd_per_hour=1.0),
        )
        self.model = model
        self.variant = variant
        self.max_rows = min(max_rows, described.max_batch or max_rows)
        self._device = device
        self._artefacts = artefacts
        self._executor = Executor(hardware, device, artefacts, threads=1)
        began = time.perf_counter()
        import_runtime(described.runtime, described.entry)
        self._before = self._held()
        self.loaded: Loaded = self._executor.load(model, variant)
        self.load = time.perf_counter() - began
        self.memory = self.peak = self._memory()

    def samples(self) -> Samples:
        """Rows for it."""
        return Samples(self.model, self.loaded.pipeline, self._artefacts)

    def run(self, items: list[Item]) -> list[Row]:
        """One batch. Raises what the model raises."""
        answers = self.loaded.pipeline.run(self.loaded.runtime, items)
        self.peak = max(self.peak, self._memory())
        return answers

    def _memory(self) -> int:
        """Bytes that the variant holds, those of its own process included."""
        apart = self.loaded.runtime.memory() if self.loaded.interruptible is not None else 0
        return max(0, self._held() - self._before) + apart

    def _held(self) -> int:
        """Bytes that this process has in memory, or that are taken on the device."""
        if self._device.kind == "cpu":
            return int(psutil.Process().memory_info().rss)
        return self._device.memory - memory_free(self._device)


def measure(subject: Subject, plan: Plan, say: Progress) -> Measurement:
    """Time the variant's grid of batches within the plan's budget, and fit its curve.

    Raises:
        SizeError: the model has no example to measure with.
        TaxiwayError: it cannot run.
    """
    points = grid(subject.model, subject.max_rows)
    samples, ends = subject.samples(), time.perf_counter() + plan.budget
    measured: list[Timed] = []
    kept: list[Run] = []
    for index, (rows, size) in enumerate(points):
        say(index, len(points), f"{rows} × {size}")
        items = [samples.item(size)] * rows
        left = ends - time.perf_counter()
        if index >= _CORNERS and fit(measured).latency(rows, size) * plan.fewest > left:
            continue
        runs, ran = _time(subject, items, plan, (ends, len(points) - index))
        kept += runs
        measured.append(Timed(rows, ran, tuple(run.seconds for run in runs)))
    return _measurement(subject, measured, kept)


def _time(subject: Subject, items: list[Item], plan: Plan, budget: tuple[float, int]) -> tuple[list[Run], float]:
    """The runs of one batch, and the size that its rows really had.

    The first run warms up: it counts only where it was no slower than the next, for it may have compiled the shape.
    """
    ends, points_left = budget
    answers: list[Row] = []
    first = timed(lambda: answers.extend(subject.run(items)))
    runs = [timed(lambda: subject.run(items))]
    if first.seconds <= _WARM * runs[0].seconds:
        runs.append(first)
    count = repeats(plan, runs[0].seconds, ends - time.perf_counter(), points_left)
    runs += [timed(lambda: subject.run(items)) for _ in range(count - len(runs))]
    sizes = [ran_size(subject.model, i.size, i.parameters, answer) for i, answer in zip(items, answers, strict=True)]
    return calmest(runs, plan.fewest), sum(sizes) / len(sizes)


def _measurement(subject: Subject, measured: list[Timed], runs: list[Run]) -> Measurement:
    curve = fit(measured)
    runtime = subject.model.variants[subject.variant].runtime
    package = RUNTIMES.get(runtime, "numpy")
    ordered = sorted(measured, key=lambda point: (point.rows, point.size))
    return Measurement(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        packages={package: version_of(package) or "unknown"},
        load=rounded(subject.load),
        memory=Size(subject.memory),
        peak=Size(subject.peak),
        base=curve.base,
        step=curve.step,
        slope=curve.slope,
        floor=curve.floor,
        residual=residuals(measured, curve),
        disturbed=rounded(min(1.0, sum(r.waited for r in runs) / max(sum(r.seconds for r in runs), 1e-9))),
        points=tuple(Point(p.rows, rounded(p.size), rounded(p.seconds)) for p in ordered),
    )


@click.command()
@click.option("--models", type=click.Path(path_type=Path), required=True)
@click.option("--model", required=True)
@click.option("--variant", required=True)
@click.option("--kind", type=click.Choice(["cpu", "cuda", "tpu"]), required=True)
@click.option("--device", required=True)
@click.option("--max-rows", type=int, required=True)
@click.option("--quick", is_flag=True)
def main(
    models: Path, model: str, variant: str, kind: Literal["cpu", "cuda", "tpu"], device: str, max_rows: int, quick: bool
) -> None:
    """Measure one variant and say so."""
    cache = cache_directory(os.environ)
    described = load_catalogue(models).resolve(model)
    try:
        ArtefactStore(cache).files(described, variant)  # what has to be fetched or converted is no part of loading
        found = find_device(bench_class(kind), device, emulate=False)
        subject = Subject(described, variant, found, ArtefactStore(cache), max_rows)
        measurement = measure(subject, QUICK if quick else FULL, _say_progress)
    except (ArtefactError, ModelLoadError, SizeError, TaxiwayError, DeviceMissingError) as error:
        _say(Said(error=str(error)))
        sys.exit(1)
    _say(Said(measurement=measurement))


def bench_class(kind: Literal["cpu", "cuda", "tpu"]) -> HardwareClass:
    """A class of that kind of device, to find one by."""
    price = Price(usd_per_hour=1.0)
    return HardwareClass(device=kind, runtimes=("echo",), max_batch=1, max_wait=0.0, price=price)


def _say_progress(done: int, of: int, what: str) -> None:
    _say(Said(done=done, of=of, next=what))


def _say(said: Said) -> None:
    sys.stdout.write(msgspec.json.encode(said, enc_hook=int).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
