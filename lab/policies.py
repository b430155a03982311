"""Does taxiway's placement meet its targets on the two Azure traces, beside every other policy and the lower bound?

`python -m lab.policies` finds, for each trace, the load up to which static routing answers 95 % of live requests
in time (if it never does, the load at which it answers most), and simulates every policy at shares of that load. It
prints each policy's attainment and cost, the cost as a multiple of the lower bound for the same answers, and whether
each target is met. `--json` prints one JSON line a figure instead.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.harness.measure import machine, say
from lab.baselines import CLAIRVOYANT, EVERY_POLICY, run
from lab.bounds.linear import NAME, lower_bound
from lab.fleet_file import FileFleet, load_fleet, prepare
from lab.rows import read_trace
from simulator.engine import RunSummary
from simulator.fleet import SERVICES
from simulator.policies.taxiway import Maker
from simulator.reports import percent
from simulator.traces import Trace
from simulator.workload import Workload
from tasks.settings import TREE

FLEET = TREE / "lab" / "fleets" / "azure-mixed.yaml"
DATA = TREE.parent / "shared" / "data"

TRACES = ("conv", "code")
SHARES = (0.3, 0.6, 0.9, 1.0, 1.2)

ATTAINED = 0.95
"""The share of live requests that static routing answers in time at share 1 of the load."""

LOADS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Start of the bisection: between the last of these loads that is attained and twice as much."""

NARROW = 1.02
"""Precision of the bisection, as a ratio of loads."""

OURS = "taxiway"

WITHIN, BOUNDED, UNDERCUT = 0.01, 1.15, 0.02
"""Targets: points of live attainment behind the clairvoyant policy; cost over the bound; by how much an equal baseline
may be cheaper."""

EQUAL = 0.001
"""Tolerance of attainment in each service: one request in a thousand."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A policy's mean attainment and cost at a share of the load, over the seeds; `bound` is for its answers."""

    trace: str
    share: float
    load: float
    policy: str
    live: float
    standard: float
    bulk: float
    cost: float
    bound: float

    def attains(self, other: Figure) -> bool:
        """Whether its attainment is at least the other's in every service."""
        return all(getattr(self, name) >= getattr(other, name) - EQUAL for name in SERVICES)


@dataclass(frozen=True, slots=True)
class Target:
    """A target on a trace, whether it is met, and the figures that show it."""

    trace: str
    target: str
    holds: bool
    because: str


class Bench:
    """The Azure traces on the example fleet, both `part` times smaller; workloads and bounds are computed once."""

    def __init__(self, data: Path, part: int = 1) -> None:
        self.fleet = smaller(load_fleet(FLEET), part)
        self._data = data
        self._part = part

    @functools.cached_property
    def _traces(self) -> Mapping[str, Trace]:
        files = {name: self._data / f"azure_llm_{name}.csv" for name in TRACES}
        return {name: read_trace(file, model=self.fleet.default_model) for name, file in files.items()}

    def workload(self, trace: str, load: float, seed: int) -> Workload:
        """The trace at a load."""
        return prepare(self._traces[trace].at_load(load / self._part, seed=seed), self.fleet, seed=seed)

    def saturation(self, trace: str, seed: int) -> float:
        """The load up to which static routing attains `ATTAINED`, by bisection; its best load if it never does."""
        tried = {load: self._static(trace, load, seed) for load in LOADS}
        reached = [load for load, attained in tried.items() if attained >= ATTAINED]
        if not reached:
            return max(tried, key=lambda load: tried[load])
        low, high = max(reached), 2 * max(reached)
        while high > NARROW * low:
            middle = (low + high) / 2
            low, high = (middle, high) if self._static(trace, middle, seed) >= ATTAINED else (low, middle)
        return low

    def _static(self, trace: str, load: float, seed: int) -> float:
        return run("static", EVERY_POLICY["static"], self.workload(trace, load, seed), seed).attainment["live"] or 0.0


def smaller(fleet: FileFleet, part: int) -> FileFleet:
    """A fleet with the number of devices of each class divided by this."""
    classes = {
        name: msgspec.structs.replace(device, count=max(device.count // part, 1), initial=device.initial // part)
        for name, device in fleet.classes.items()
    }
    return replace(fleet, classes=classes)


def mean(trace: str, share: float, load: float, runs: Sequence[tuple[RunSummary, float]]) -> Figure:
    """The combined runs of one policy, each with the bound for its answers."""
    attained = {name: sum(run.attainment[name] or 0.0 for run, _ in runs) / len(runs) for name in SERVICES}
    cost, bound = (sum(figures) / len(runs) for figures in zip(*((r.cost_usd, b) for r, b in runs), strict=True))
    return Figure(trace, share, load, runs[0][0].policy, **attained, cost=cost, bound=bound)


def measured(
    bench: Bench, trace: str, load: float, share: float, seeds: Sequence[int], makers: Mapping[str, Maker]
) -> Iterator[Figure]:
    """Each policy's figures at a share of the load."""
    workloads = {seed: bench.workload(trace, load * share, seed) for seed in seeds}
    bounds = {seed: lower_bound(workload) for seed, workload in workloads.items()}
    for name, make in makers.items():
        summaries = [(seed, run(name, make, workload, seed)) for seed, workload in workloads.items()]
        yield mean(trace, share, load, [(found, bounds[seed].of(found.attainment)) for seed, found in summaries])


def targets(trace: str, figures: Sequence[Figure]) -> list[Target]:
    """The targets, checked against the available figures of one trace."""
    ours = {figure.share: figure for figure in figures if figure.policy == OURS}
    others = [figure for figure in figures if figure.policy not in (OURS, CLAIRVOYANT)]
    equal = [other for other in others if other.share in ours and other.attains(ours[other.share])]
    found = []
    if 1.0 in ours:
        here = ours[1.0]
        seer = next((f for f in figures if f.policy == CLAIRVOYANT and f.share == 1.0), here)
        behind = seer.live - here.live
        because = f"{percent(here.live)}, the clairvoyant {percent(seer.live)}"
        found.append(Target(trace, "live within 1 point of the clairvoyant", behind <= WITHIN, because))
        cheaper = [other for other in equal if other.share == 1.0 and other.cost <= here.cost]
        found.append(Target(trace, "cheaper than every equal baseline", not cheaper, _named(cheaper, here)))
        ratio = here.cost / here.bound
        found.append(Target(trace, "at most 1.15 of the bound", ratio <= BOUNDED, f"{ratio:.2f} of it"))
    under = [other for other in equal if other.cost < ours[other.share].cost * (1 - UNDERCUT)]
    because = "; ".join(f"at {other.share:g}: {_named([other], ours[other.share])}" for other in under) or "none does"
    return [*found, Target(trace, "no equal baseline costs over 2 % less", not under, because)]


def _named(others: Sequence[Figure], ours: Figure) -> str:
    costs = [f"{other.policy} ${other.cost:.2f}" for other in sorted(others, key=lambda other: other.cost)]
    return f"${ours.cost:.2f} against {', '.join(costs) or 'no equal one'}"


def table(figures: Sequence[Figure], title: str) -> Table:
    """Figures of one trace and share, for people."""
    shown = Table("policy", *SERVICES, "cost", "times the bound", title=title, box=None, title_justify="left")
    for figure in figures:
        attained = [percent(getattr(figure, name)) for name in SERVICES]
        ratio = f"{figure.cost / figure.bound:.2f}" if figure.bound else "–"
        shown.add_row(figure.policy, *attained, f"${figure.cost:.2f}", ratio)
    return shown


def parser(name: str, description: str | None, traces: Sequence[str] = TRACES) -> argparse.ArgumentParser:
    """The options of benchmarks on the Azure traces."""
    made = argparse.ArgumentParser(prog=f"python -m lab.{name}", description=description)
    made.add_argument("--data", type=Path, default=DATA, help="the folder of azure_llm_conv.csv and azure_llm_code.csv")
    made.add_argument("--trace", action="append", choices=traces, help="all, unless named")
    made.add_argument(
        "--load", type=float, help="where static routing attains 95 %% live; found by bisection, unless given"
    )
    made.add_argument("--seeds", type=int, default=2, help="how many, from 1")
    made.add_argument("--part", type=int, default=1, help="play a fleet and a load so many times smaller")
    made.add_argument("--json", action="store_true", help="print JSON lines")
    return made


def main() -> None:
    """Simulate all policies, and print figures and targets."""
    options = parser("policies", __doc__)
    options.add_argument("--share", action="append", type=float, help=f"of the load; {SHARES}, unless named")
    options.add_argument("--policy", action="append", choices=sorted(EVERY_POLICY), help="all, unless named")
    given = options.parse_args()
    bench, seeds = Bench(given.data, given.part), range(1, given.seeds + 1)
    makers = {name: make for name, make in EVERY_POLICY.items() if name in (given.policy or EVERY_POLICY)}
    console = Console(width=None if sys.stdout.isatty() else 120)
    shares, traces = given.share or SHARES, given.trace or TRACES
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("policies", total=len(traces) * len(shares))
        for trace in traces:
            load, figures = given.load or bench.saturation(trace, seeds[0]), []
            for share in shares:
                figures += (here := list(measured(bench, trace, load, share, seeds, makers)))
                title = f"\n{trace}, {share:g} of load {load:.2f}, {NAME} by each one's answers"
                show(here, title, None if given.json else console)
                progress.advance(task)
            judge(targets(trace, figures), None if given.json else console)


def show(figures: Sequence[Figure], title: str, console: Console | None) -> None:
    """Print figures as a table, or as JSON lines without a console."""
    if console is not None:
        console.print(table(figures, title))
        return
    for figure in figures:
        say({"question": "attainment and cost", **machine(), **asdict(figure)})


def judge(found: Iterable[Target], console: Console | None) -> None:
    """Print whether each target is met, for people or as JSON lines."""
    for target in found:
        if console is None:
            say({"question": "targets", **machine(), **asdict(target)})
        else:
            console.print(f"{'holds' if target.holds else 'FAILS'}  {target.target}: {target.because}")


if __name__ == "__main__":
    main()
