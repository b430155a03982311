"""Measures a variant in a process of its own, whose memory is then the variant's, and writes its profile.

The profiles are files; people get a table.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from tasks.document import Size
from tasks.machine import RUNTIMES
from tasks.models.artefacts import ArtefactError, ArtefactStore
from tasks.models.model import Model
from tasks.models.profiles import (
    DeviceProfile,
    Measurement,
    Point,
    Processor,
    ProfileError,
    load_profile,
    profile_path,
    ran_size,
    render_profile,
)
from tasks.models.signature import bind
from tasks.settings import cache_directory
from tasks.topology import DeviceKind, HardwareClass, Price
from taxiway.errors import TaxiwayError
from taxiway.release import version_of
from workers.device import Device, DeviceMissingError, memory_free
from workers.executor import Executor
from workers.learned import Loaded
from workers.port import Item, ModelLoadError, Row, import_runtime
from workers.profiling.fit import RunBudget, Timed, fit, grid, repeats, residuals, rounded


class MeasuredOutcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A measurement, or the reason why there is none: `skipped` if it was not tried, `error` if it failed."""

    model: str
    variant: str
    measurement: Measurement | None = None
    skipped: str = ""
    error: str = ""


def write(outcomes: Sequence[MeasuredOutcome], device: Processor, root: Path) -> list[Path]:
    """Write a profile file for each measured model; returns the paths.

    Variants in an older file that were not measured now are kept.
    """
    paths = []
    for model in dict.fromkeys(outcome.model for outcome in outcomes if outcome.measurement):
        path = profile_path(root, model, device)
        new = {o.variant: o.measurement for o in outcomes if o.model == model and o.measurement}
        profile = DeviceProfile(
            model=model, device=device, source="measured", variants=_kept(path, model, device) | new
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render_profile(profile), encoding="utf-8")
        paths.append(path)
    return paths


def _kept(path: Path, model: str, device: Processor) -> dict[str, Measurement]:
    """The variants of an older measurement of this model version on this device."""
    try:
        old = load_profile(path)
    except ProfileError:
        return {}
    alike = old.model == model and old.device == device and old.source == "measured"
    return dict(old.variants) if alike else {}


DISTURBED = 0.1
"""Share of timed seconds lost to other processes above which a variant is reported as disturbed."""

_COLUMNS = ("variant", "load", "memory", "seconds a batch of b rows of size s", "p50", "p95", "points")


def show(outcomes: Sequence[MeasuredOutcome], files: Sequence[Path], device: Processor, console: Console) -> None:
    """Print the fits, what could not be measured, and the files' paths."""
    table = Table(title=f"{device.kind}: {device.name}", caption="p50, p95: observed over predicted seconds")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name not in (_COLUMNS[0], _COLUMNS[3]) else "left")
    for outcome in outcomes:
        if outcome.measurement:
            table.add_row(f"{outcome.model}/{outcome.variant}", *_cells(outcome.measurement))
    if table.rows:
        console.print(table)
    for remark in remarks(outcomes):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    for path in files:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def remarks(outcomes: Sequence[MeasuredOutcome]) -> Iterator[str]:
    """A line for each variant that was skipped, failed or was disturbed."""
    for outcome in outcomes:
        name = f"{outcome.model}/{outcome.variant}"
        if outcome.skipped:
            yield f"skipped: {name}: {outcome.skipped}"
        elif outcome.error:
            yield f"failed: {name}: {outcome.error}"
        elif outcome.measurement and outcome.measurement.disturbed > DISTURBED:
            share = outcome.measurement.disturbed
            yield f"disturbed: {name}: other processes used the processor for {share:.0%} of its seconds"


def formula(found: Measurement) -> str:
    """The fitted curve without zero terms: `max(3 ms, 2 ms + 0.11 ms·b·s)`."""
    terms = ((found.base, ""), (found.step, "·s"), (found.slope, "·b·s"))
    curve = " + ".join(f"{_seconds(value)}{unit}" for value, unit in terms if value) or "0"
    return f"max({_seconds(found.floor)}, {curve})" if found.floor else curve


def _cells(found: Measurement) -> tuple[str, ...]:
    memory = f"{max(found.memory, found.peak) / 2**20:,.0f} MiB"
    ratios = (f"{found.residual.p50:.2f}", f"{found.residual.p95:.2f}")
    return (_seconds(found.load), memory, formula(found), *ratios, str(len(found.points)))


def _seconds(value: float) -> str:
    """A duration in a suitable unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns" if value else "0"


CALM = 0.05
"""Largest share of a run that its threads may wait for a processor if it counts as undisturbed."""


@dataclass(frozen=True, slots=True)
class TimedRun:
    """Seconds of one batch, and the seconds of them in which this process's threads waited for a processor."""

    seconds: float
    waited: float

    @property
    def disturbed(self) -> float:
        """Share of the seconds spent waiting."""
        return min(1.0, self.waited / self.seconds) if self.seconds > 0 else 0.0


def timed(batch: Callable[[], object]) -> TimedRun:
    """Run the batch."""
    waited, began = _waited(), time.perf_counter()
    batch()
    seconds = time.perf_counter() - began
    return TimedRun(seconds, max(0.0, _waited() - waited))


def least_disturbed(runs: Sequence[TimedRun], fewest: int) -> list[TimedRun]:
    """The undisturbed runs if there are at least `fewest`, else the `fewest` least disturbed."""
    calm = [run for run in runs if run.disturbed <= CALM]
    return calm if len(calm) >= fewest else sorted(runs, key=lambda run: run.disturbed)[:fewest]


def _waited() -> float:
    """Seconds that the process's threads have waited on run queues (proc(5): schedstat); 0 if unavailable."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended, or the kernel has no such statistics
            continue
    return total / 1e9


_WORDS = ("a", "quiet", "harbour", "town", "wakes", "slowly", "while", "ferries", "leave", "for", "the", "islands", ".")


class SizeError(Exception):
    """No row of that size can be made for the model."""


_CORNERS = 4  # points of the grid that are always timed: without them a curve extrapolates

_WARM = 1.1
"""A first run of up to this multiple of the second counts as warm."""


class Subject:
    """One variant on one device, loaded by the worker's own executor."""

    def __init__(self, model: Model, variant: str, device: Device, artefacts: ArtefactStore, max_rows: int) -> None:
        described = model.variants[variant]
        hardware = bench_class(device.kind, max_rows, described.runtime)
        self.model = model
        self.variant = variant
        self.max_rows = min(max_rows, described.max_batch or max_rows)
        self._device = device
        self._artefacts = artefacts
        self._executor = Executor(hardware, device, artefacts, threads=1)
        began = time.perf_counter()
        import_runtime(described.runtime)
        self._before = self._held()
        self.loaded: Loaded = self._executor.load(model, variant)
        self.load = time.perf_counter() - began
        self.memory = self.peak = self._memory()

    def item(self, size: int) -> Item:
        """A row of the size, or of the nearest that the model allows.

        Raises:
            SizeError: the model has no example.
        """
        return self._largest(size) if self.model.pipeline == "text" else self._from_example(size)

    def run(self, items: list[Item]) -> list[Row]:
        """Run one batch. Raises what the model raises."""
        answers = self.loaded.pipeline.run(self.loaded.runtime, items)
        self.peak = max(self.peak, self._memory())
        return answers

    def _largest(self, size: int) -> Item:
        """The row with the most words that does not exceed the size; at least one."""
        low, high = 1, size
        while low < high:
            middle = (low + high + 1) // 2
            if self._words(middle).size <= size:
                low = middle
            else:
                high = middle - 1
        return self._words(low)

    def _words(self, count: int) -> Item:
        text = " ".join(_WORDS[i % len(_WORDS)] for i in range(count))
        return self.loaded.pipeline.prepare({self.model.inputs[0].name: text}, {})

    def _from_example(self, size: int) -> Item:
        if not self.model.examples:
            raise SizeError(f"{self.model.id} has no example to measure with")
        inputs = self._artefacts.example(self.model, self.model.examples[0])
        row, unit = dict(bind(self.model, inputs, {}).rows[0]), self.model.unit
        return self.loaded.pipeline.prepare(row | {unit.name: size} if unit.kind == "value" else row, {})

    def _memory(self) -> int:
        """Bytes that the variant uses, including its own process's."""
        apart = self.loaded.runtime.memory() if self.loaded.interruptible is not None else 0
        return max(0, self._held() - self._before) + apart

    def _held(self) -> int:
        """Bytes of this process in memory, or in use on the device."""
        if self._device.kind == "cpu":
            return int(psutil.Process().memory_info().rss)
        return self._device.memory - memory_free(self._device)


def measure(subject: Subject, plan: RunBudget) -> Measurement:
    """Time the variant's grid of batches within the plan's budget, and fit its curve.

    Raises:
        SizeError: the model has no example.
        TaxiwayError: it cannot run.
    """
    points = grid(subject.model, subject.max_rows)
    ends = time.perf_counter() + plan.budget
    measured: list[Timed] = []
    kept: list[TimedRun] = []
    for index, (rows, size) in enumerate(points):
        items = [subject.item(size)] * rows
        left = ends - time.perf_counter()
        if index >= _CORNERS and fit(measured).latency(rows, size) * plan.fewest > left:
            continue
        runs, ran = _time(subject, items, plan, (ends, len(points) - index))
        kept += runs
        measured.append(Timed(rows, ran, tuple(run.seconds for run in runs)))
    return _measurement(subject, measured, kept)


def _time(
    subject: Subject, items: list[Item], plan: RunBudget, budget: tuple[float, int]
) -> tuple[list[TimedRun], float]:
    """The runs of one batch, and the actual size of its rows.

    The first run may compile the shape; it counts only if it was not slower than the next one.
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
    return least_disturbed(runs, plan.fewest), sum(sizes) / len(sizes)


def _measurement(subject: Subject, measured: list[Timed], runs: list[TimedRun]) -> Measurement:
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


def measured_outcome(model: Model, variant: str, device: Device, max_rows: int, plan: RunBudget) -> MeasuredOutcome:
    """What measuring a variant found, or why it failed."""
    artefacts = ArtefactStore(cache_directory(os.environ))
    try:
        artefacts.files(model, variant)  # fetching and conversion are not part of loading
        measurement = measure(Subject(model, variant, device, artefacts, max_rows), plan)
        return MeasuredOutcome(model=model.id, variant=variant, measurement=measurement)
    except (ArtefactError, ModelLoadError, SizeError, TaxiwayError, DeviceMissingError) as error:
        return MeasuredOutcome(model=model.id, variant=variant, error=str(error))


def bench_class(kind: DeviceKind, rows: int = 1, runtime: str = "echo") -> HardwareClass:
    """A hardware class of a kind of device, for batches of up to `rows` rows."""
    price = Price(usd_per_hour=1.0)
    return HardwareClass(device=kind, runtimes=(runtime,), max_batch=rows, max_wait=0.0, price=price)
