"""How much of a machine does a queue cost? taxiway, Celery and four model servers on five workloads, against the limit.

`python -m benchmarks.suite [--only W0,W1] [--peers mosec,ray] [--seconds 10] [--rounds 3] [--allow-absent]` runs every
contestant in several rounds with the same load: sequential requests, the workload's number of outstanding requests, and
Poisson arrivals at half the throughput just reached. In the same rounds it runs the model in a bare loop on the same
cores, which is the limit. It prints a JSON line per figure (the median of the rounds and their spread), then the target
ratios, and writes a chart. It exits with status 1 if a contestant was absent, unless `--allow-absent` is given.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from benchmarks.harness.bars import write_chart
from benchmarks.harness.measure import CHARTS, Line, answer, machine, say
from benchmarks.harness.processes import NotReadyError
from benchmarks.suite.callers import Caller
from benchmarks.suite.catalogue import plan_of, write_catalogue
from benchmarks.suite.contestants import CONTESTANTS, Up
from benchmarks.suite.installing import AbsentError
from benchmarks.suite.limit import best_layout, measure_limit
from benchmarks.suite.load import UnreliableError
from benchmarks.suite.panels import panels_of
from benchmarks.suite.ratios import RATIOS
from benchmarks.suite.visit import visit
from benchmarks.suite.workloads import WORKLOADS, Plan, Workload

LIMIT = "limit"

_TERMINATED = 128 + signal.SIGTERM  # as a shell reports it

Key = tuple[str, str]
"""A contestant and a measure."""


@dataclass(slots=True)
class Results:
    """One workload's results: the figure of each round by contestant and measure, units, and absent contestants."""

    plan: Plan
    figures: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    units: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def workload(self) -> Workload:
        """The workload."""
        return self.plan.workload

    def add(self, contestant: str, measure: str, unit: str, figure: float) -> None:
        """Add one round's figure."""
        self.figures[contestant, measure].append(figure)
        self.units[measure] = unit.replace("item", self.workload.unit.rstrip("s"))

    def leave_out(self, name: str, error: Exception) -> None:
        """Record why a contestant is absent from now on."""
        self.absent[name] = str(error) or "it did not get through in time"
        _progress(self, name, f"absent: {self.absent[name]}")

    def lines(self) -> Iterator[Line]:
        """A line per figure, per ratio, and per absent contestant."""
        about = {"workload": self.workload.name, "workers": self.plan.workers, "threads": self.plan.threads}
        for (contestant, measure), rounds in self.figures.items():
            question = f"{self.workload.name} {self.workload.title}: {contestant} {measure}, {self.units[measure]}"
            yield answer(question, rounds, **about, contestant=contestant, measure=measure)
        for ratio in RATIOS[self.workload.name]:
            if rounds := ratio.rounds(self.figures):
                question = f"{self.workload.name} {self.workload.title}: {ratio.question}"
                yield answer(question, rounds, **about, target=ratio.target, holds=ratio.holds(rounds))
        for contestant, reason in self.absent.items():
            yield {"question": f"{self.workload.name}: {contestant}", **machine(), **about, "absent": reason}


class Suite:
    """Runs the rounds of each workload."""

    def __init__(self, folder: Path, *, seconds: float, contestants: Sequence[str]) -> None:
        self._folder = folder
        self._models = folder / "models"
        self._seconds = seconds
        self._contestants = contestants

    def run(self, workload: Workload, rounds: int) -> Results:
        """Run all rounds of a workload. A contestant that cannot run is absent from then on."""
        plan = plan_of(workload, self._models)
        results = Results(best_layout(plan, self._models, self._folder, seconds=self._seconds / 2))
        for number in range(rounds):
            self._limit(results)
            for contestant in self._contestants:
                if contestant not in results.absent:
                    self._visit(contestant, results, number)
        return results

    def _limit(self, results: Results) -> None:
        seconds = self._seconds
        limit = measure_limit(results.plan, self._models, self._folder, seconds=seconds)
        results.add(LIMIT, "saturated", "items/s", limit.rate)
        results.add(LIMIT, "cpu loop", "µs/item", 1e6 * limit.cpu)
        _progress(results, LIMIT, f"{limit.rate:,.0f} {results.workload.unit}/s")

    def _visit(self, contestant: str, results: Results, number: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix=f"{contestant}-", dir=self._folder))
        try:
            with CONTESTANTS[contestant](results.plan, folder, self._models) as up:
                there = [name for name in up.callers if name not in results.absent]
                for name in there:
                    self._ask(name, up.callers[name](), up, results, number)
        except (AbsentError, NotReadyError) as error:
            results.leave_out(contestant, error)

    def _ask(self, name: str, caller: Caller, up: Up, results: Results, number: int) -> None:
        began = time.monotonic()
        try:
            made = visit(caller, up.processes, results.workload, seconds=self._seconds, seed=number)
            figures = uvloop.run(made)
        except (UnreliableError, TimeoutError) as error:
            results.leave_out(name, error)
            return
        for measure, (unit, figure) in figures.measures().items():
            results.add(name, measure, unit, figure)
        _progress(results, name, f"{figures.rate:,.0f} {results.workload.unit}/s, {time.monotonic() - began:.0f} s")


def main() -> None:
    """Measure, print every figure, and write the chart."""
    given = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # so that child processes are stopped
    with tempfile.TemporaryDirectory() as folder:
        write_catalogue(Path(folder) / "models", given.only)
        suite = Suite(Path(folder), seconds=given.seconds, contestants=["taxiway", *given.peers])
        all_results = []
        for workload in given.only:
            all_results.append(suite.run(workload, given.rounds))
            for line in all_results[-1].lines():
                say(line)
    about = f"{machine()['device']}, commit {machine()['commit']}, {given.rounds} rounds of {given.seconds:g} s"
    panels = [panel for results in all_results for panel in panels_of(results.workload, results.figures)]
    write_chart(given.chart, "taxiway beside its limit and its peers", about, panels)
    if not given.allow_absent and (complaint := absence(all_results)):
        sys.exit(complaint)


def absence(all_results: Sequence[Results]) -> str:
    """An error that names each absent contestant with its reason; empty if none is absent."""
    reasons = {name: reason for results in all_results for name, reason in results.absent.items()}
    if not reasons:
        return ""
    lines = [f"{name}: {reason}" for name, reason in reasons.items()]
    return "\n  ".join(["error: contestants are absent:", *lines]) + "\nhint: --allow-absent compares the others"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    peers = [name for name in CONTESTANTS if name != "taxiway"]
    parser.add_argument("--only", type=_workloads, default=list(WORKLOADS.values()), help="workloads: W0,W2")
    parser.add_argument("--peers", type=lambda text: _among(peers, text), default=peers, help=f"of {','.join(peers)}")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each saturated loop")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median of each figure counts")
    parser.add_argument("--allow-absent", action="store_true", help="exit with 0 though a contestant was absent")
    parser.add_argument("--chart", type=Path, default=CHARTS / "suite.html", help="where the chart is written")
    return parser.parse_args()


def _workloads(text: str) -> list[Workload]:
    return [WORKLOADS[name] for name in _among(WORKLOADS, text)]


def _among(known: Iterable[str], text: str) -> list[str]:
    """The names in a comma-separated list; empty text gives none."""
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(known):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return names


def _progress(results: Results, contestant: str, what: str) -> None:
    sys.stderr.write(f"{results.workload.name} {contestant}: {what}\n")


if __name__ == "__main__":
    main()
