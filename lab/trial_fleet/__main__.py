"""Does the plan of a real fleet beat what a good operator would configure, where several models share two classes?

`python -m lab.trial_fleet` runs an autoscaled fleet of real processes, with emulated devices (`paced` models),
ten minutes for each side. At half time images double and the language model halves. The sides run the same requests on
the same fleet:

- `taxiway`: routers follow the plan that the fleet's tuner makes. It knows nothing when the trial begins, or with
  `--warm` what arrived in the seconds before, another draw of the first half's requests. These precede every side's
  run and are not counted.
- `tuned-split`: each model and service has one class, found by simulation on the first half of the requests. Classes
  scale as routers want them.
- `pinned`: each model has one class, found likewise. Classes scale on queue length as KEDA does.

An operator's requests name their class as their locality. The score is the powered seconds of all workers times their
price, plus the penalties for what was late, refused or unanswered; lower is better.

The simulator plays each side on the same requests: its order of the sides should be that of the real fleet, and its
costs within `ALIKE` of the real ones. `--start` is what a worker takes to start on this machine, for the simulator.
With `--cold` models take seconds to load, and a device cannot hold all of them. With `--llama` there is a fifth model,
whose answers llama.cpp computes on the cores that the fleet's own processes have; costs may then be `SHARED` apart.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import taxiway
from benchmarks.harness.bars import Bar, Panel, write_chart
from benchmarks.harness.measure import CHARTS, machine
from lab.changes import simulate
from lab.fleet_file import prepare
from lab.trial_fleet import generations
from lab.trial_fleet.autoscaled import Powered, Site, autoscaled
from lab.trial_fleet.emulated_models import (
    BULK_DUE,
    COLD,
    DEAR,
    LIGHT,
    MODELS,
    PENALTIES,
    QUEUES,
    Asked,
    Weights,
    requests,
    simulated,
    write_models,
)
from lab.trial_fleet.queue_scaling import QueueScaling
from lab.trials.runs import OURS
from lab.trials.targets import OPPONENTS
from local.autoscaler import Ask, ask_router
from router.decide.plan import Depth
from simulator.engine import RunSummary
from simulator.fleet import SERVICES, Fleet
from simulator.policies.policy import Assignment, Shift
from simulator.policies.taxiway import POLICIES, Taxiway
from simulator.pool import Pool
from simulator.reports import percent
from simulator.traces import Column, Trace
from simulator.tuning.opponents import pinned, tuned_split
from simulator.workload import Workload
from tasks.topology import Topology, parse_topology
from taxiway.contract.job import RunReport
from taxiway.errors import DeadlineExceededError, OverloadedError, TaxiwayError

SECONDS = 600
"""Length of a run's requests."""

SIDES = (OURS, *OPPONENTS)

ALIKE = 0.1
"""Share by which a simulated cost may differ from that of the real fleet."""

SHARED = 0.25
"""The same where llama.cpp shares the cores with the fleet's own processes."""

LAST = BULK_DUE
"""Seconds after the last request for which answers are awaited: none is in time later."""

Homes = Mapping[tuple[int, int], str]
"""The class of each model and service, by their numbers."""


@dataclass(frozen=True, slots=True)
class Side:
    """How a fleet is configured: the classes that requests name, whether a tuner plans, and who scales."""

    name: str
    homes: Homes
    ask: Ask
    assigned: Assignment | None = None

    @property
    def planned(self) -> bool:
        """Whether a tuner plans."""
        return self.assigned is None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What a side attained and cost. `planned` is the share of answers whose placement followed a plan.

    `failed` counts requests that got another error than a refusal or a missed deadline. `simulated` is the score of the
    same requests in the simulator, and `simulated_usd` their cost there.
    """

    side: str
    seed: int
    seconds: float
    warm: float
    requests: int
    attainment: dict[str, float]
    live_by_model: dict[str, float]
    cost_usd: float
    score: float
    simulated_usd: float
    simulated: float
    powered: dict[str, float]
    refused: int
    failed: int
    planned: float
    first_classes: dict[str, str]


@dataclass(frozen=True, slots=True)
class Scene:
    """What is sent: the requests with those of the `warm` seconds before the trial, whose length is `seconds`.

    `weights` is what the emulated models take, `pace` what llama.cpp does, if it is there.
    """

    trace: Trace
    seconds: float
    warm: float
    seed: int
    weights: Weights = LIGHT
    pace: generations.Pace | None = None

    def fleet(self, topology: Topology) -> Fleet:
        """The simulator's fleet."""
        fleet = simulated(topology, self.weights)
        if self.pace is None:
            return fleet
        return generations.with_engines(fleet, topology.hardware[generations.CLASS], self.pace)


class Answers:
    """Of each request: seconds until its answer, NaN without one, where and why it ran, whether it was refused."""

    def __init__(self, count: int) -> None:
        self.seconds = np.full(count, math.nan)
        self.refused, self.failed = np.zeros(count, bool), np.zeros(count, bool)
        self.reports: list[RunReport | None] = [None] * count

    def of(self, rows: Column) -> list[RunReport | None]:
        """The reports of some requests."""
        return [self.reports[number] for number in np.flatnonzero(rows).tolist()]


def side(name: str, scene: Scene, topology: Topology) -> Side:
    """The configuration of a side; an operator's is searched on the first half of the scene's requests."""
    if name == OURS:
        return Side(name, {}, ask_router)
    workload = prepare(scene.trace, scene.fleet(topology), seed=1)
    found = (tuned_split if name == "tuned-split" else pinned)(workload, 1)
    return Side(name, homes_of(found, list(topology.hardware)), _scaling(found, topology), found)


class AtHome(Taxiway):
    """The router's own placement of requests that name their class, which refuses what would be late there."""

    def __init__(self, workload: Workload, assigned: Assignment) -> None:
        super().__init__(workload)
        names = list(workload.fleet.classes)
        self._rules = assigned.rules
        self._constraints = [
            [replace(terms, classes=(names[assigned.classes[model, place]],)) for place, terms in enumerate(services)]
            for model, services in enumerate(self._constraints)
        ]

    def look(self, pools: Sequence[Pool], now: float) -> Iterator[Shift]:
        """As `Policy.look`."""
        for pool, rule in zip(pools, self._rules, strict=True):
            pool.follow(rule)
        return super().look(pools, now)


def foreseen(one: Side, scene: Scene, topology: Topology) -> RunSummary:
    """What the simulator says of a side on the same requests, those before the trial included."""
    workload = prepare(scene.trace, scene.fleet(topology), seed=1)
    policy = POLICIES[OURS](workload, 1) if one.assigned is None else AtHome(workload, one.assigned)
    return simulate(one.name, workload, policy, seed=1)


def homes_of(found: Assignment, names: Sequence[str]) -> Homes:
    """The classes of an assignment by name."""
    return {cell: names[place] for cell, place in found.classes.items()}


def _scaling(found: Assignment, topology: Topology) -> Ask:
    rule = found.rules[0]
    if not isinstance(rule, Depth):
        return ask_router
    return QueueScaling(rule, {name: one.scaling.maximum or 1 for name, one in topology.hardware.items()})


def described(*, llama: bool) -> str:
    """The fleet's queues.yaml."""
    text = QUEUES.read_text()
    return text.replace("\nservice:", f"{generations.QUEUES}\nservice:", 1) if llama else text


def run(one: Side, scene: Scene, topology: Topology, progress: Callable[[float], None]) -> Run:
    """Run a side on a new fleet; `progress` is called with the seconds done."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder / "models", scene.weights)
        if scene.pace is not None:
            generations.write_model(folder / "models", scene.pace)
        queues, text = folder / "queues.yaml", described(llama=scene.pace is not None)
        if not one.planned:
            text = text.replace("plan: {enabled: true", "plan: {enabled: false", 1)
        queues.write_text(text)
        most = {label: hardware.scaling.maximum or 1 for label, hardware in topology.hardware.items()}
        with autoscaled(Site(folder / "fleet", queues, folder / "models", most, (DEAR,)), one.ask) as (fleet, powered):
            answers = asyncio.run(replayed(fleet.broker, one, scene, powered, progress))
    return result(one, scene, answers, powered.seconds, topology, foreseen(one, scene, topology))


async def replayed(url: str, one: Side, scene: Scene, powered: Powered, progress: Callable[[float], None]) -> Answers:
    """Send every request when it is due, and await the answers."""
    trace = scene.trace
    answers = Answers(len(trace))
    async with taxiway.AsyncClient(url) as client:
        began, asked = time.perf_counter(), []
        for number, arrival in enumerate(trace.arrival.tolist()):
            if arrival >= scene.warm:
                powered.counting.set()
            await asyncio.sleep(max(arrival - (time.perf_counter() - began), 0.0))
            asked.append(asyncio.create_task(_answered(client, one, trace, number, answers)))
            progress(arrival)
        _, late = await asyncio.wait(asked, timeout=LAST)
        for task in late:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    powered.counting.clear()
    return answers


async def _answered(client: taxiway.AsyncClient, one: Side, trace: Trace, number: int, answers: Answers) -> None:
    model, service = int(trace.model[number]), int(trace.service[number])
    began = time.perf_counter()
    try:
        found = await client.infer(
            trace.models[model],
            generations.request(number) if trace.models[model] == generations.STORY else f"request {number}",
            service=SERVICES[service],
            deadline=float(trace.deadline[number]),
            locality=one.homes.get((model, service)),
        )
    except DeadlineExceededError:
        return
    except OverloadedError:
        answers.refused[number] = True
    except TaxiwayError as error:
        answers.failed[number] = True
        sys.stderr.write(f"{one.name}: request {number}: {error}\n")
    else:
        answers.seconds[number], answers.reports[number] = time.perf_counter() - began, found.report


def result(
    one: Side, scene: Scene, answers: Answers, spent: Mapping[str, float], topology: Topology, foreseen: RunSummary
) -> Run:
    """A run's figures. The requests before the trial do not count, but in what was `foreseen`."""
    trace, counted = scene.trace, scene.trace.arrival >= scene.warm
    timely, live = answers.seconds <= trace.deadline, trace.service == SERVICES.index("live")
    services = {name: counted & (trace.service == number) for number, name in enumerate(SERVICES)}
    models = {name: counted & (trace.model == number) for number, name in enumerate(trace.models)}
    shares = {name: float(timely[rows].mean()) for name, rows in services.items()}
    cost = sum(topology.hardware[name].dollars_per_hour / 3600 * powered for name, powered in spent.items())
    missed = sum(dollars * (1 - share) for dollars, share in zip(PENALTIES, shares.values(), strict=True))
    reports = [report for report in answers.of(counted) if report is not None]
    return Run(
        side=one.name,
        seed=scene.seed,
        seconds=scene.seconds,
        warm=scene.warm,
        requests=int(counted.sum()),
        attainment=shares,
        live_by_model={name: float(timely[live & rows].mean()) for name, rows in models.items()},
        cost_usd=cost,
        score=cost + missed * scene.seconds / 3600,
        simulated_usd=foreseen.cost_usd,
        simulated=foreseen.score,
        powered={name: round(powered, 1) for name, powered in spent.items()},
        refused=int((counted & answers.refused).sum()),
        failed=int((counted & answers.failed).sum()),
        planned=sum(report.reason.startswith("planned:") for report in reports) / max(len(reports), 1),
        first_classes={name: _first_class(answers.of(rows)) for name, rows in models.items()},
    )


def _first_class(reports: Sequence[RunReport | None]) -> str:
    """The class where most of these requests ran, with the share in percent."""
    ran = Counter(report.hardware_class for report in reports if report is not None)
    return "none" if not ran else f"{ran.most_common(1)[0][0]} {percent(ran.most_common(1)[0][1] / ran.total())}"


def table(runs: Sequence[Run]) -> Table:
    """Each side's means over the seeds, lowest score first."""
    heads = (
        "side",
        *SERVICES,
        "worst model, live",
        "cost",
        "simulated",
        "score",
        "simulated",
        "range",
        "refused",
        "planned",
        "classes",
    )
    shown = Table(
        *heads,
        title=f"\n{runs[0].seconds:g} s after {runs[0].warm:g} s, {len({run.seed for run in runs})} seeds",
        box=None,
    )
    shown.title_justify = "left"
    for group in grouped(runs):
        shown.add_row(*_cells(group), style="bold" if group[0].side == OURS else None)
    return shown


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each side, lowest mean score first."""
    groups = [[run for run in runs if run.side == name] for name in dict.fromkeys(run.side for run in runs)]
    return sorted(groups, key=lambda group: fmean(run.score for run in group))


def _cells(group: Sequence[Run]) -> Iterator[str]:
    yield group[0].side
    for service in SERVICES:
        yield percent(fmean(run.attainment[service] for run in group))
    worst, model = min((fmean(run.live_by_model[name] for run in group), name) for name in group[0].live_by_model)
    yield f"{model} {percent(worst)}"
    for figure in ("cost_usd", "simulated_usd"):
        yield f"${fmean(getattr(run, figure) for run in group):.2f}"
    for figure in ("score", "simulated"):
        yield f"{fmean(getattr(run, figure) for run in group):.2f}"
    yield f"{min(run.score for run in group):.2f}–{max(run.score for run in group):.2f}"
    yield f"{fmean(run.refused for run in group):.0f}"
    yield percent(fmean(run.planned for run in group))
    yield ", ".join(f"{model} {place}" for model, place in group[-1].first_classes.items())


def verdict(runs: Sequence[Run]) -> str:
    """Whether taxiway's mean score is below each opponent's by more than the largest spread of a side."""
    scores = {group[0].side: [run.score for run in group] for group in grouped(runs)}
    if OURS not in scores or len(scores) == 1:
        return "nothing to compare"
    ours = fmean(scores.pop(OURS))
    better = min(map(fmean, scores.values()))
    every = [[run.score for run in group] for group in grouped(runs)]
    spread = max(max(figures) - min(figures) for figures in every)
    repeats = min(map(len, every))
    holds = repeats > 1 and better - ours > spread
    known = f"spread {spread:.2f}" if repeats > 1 else "spread unknown: one run a side"
    detail = f"{ours:.2f} against {better:.2f} of the better opponent, {known}"
    return f"{'holds' if holds else 'FAILS'}  score better than the opponents' by more than the spread: {detail}"


def agreement(runs: Sequence[Run], alike: float) -> str:
    """Whether the simulator orders the sides as the real fleet does, and its costs are within `alike` of the real."""
    real = [group[0].side for group in grouped(runs)]
    played = {group[0].side: fmean(run.simulated for run in group) for group in grouped(runs)}
    off = max(abs(run.simulated_usd / run.cost_usd - 1) for run in runs)
    order = sorted(real, key=played.__getitem__)
    holds = order == real and off <= alike
    return f"{'holds' if holds else 'FAILS'}  simulated order {', '.join(order)}; costs at most {percent(off)} apart"


def main() -> None:
    """Run all sides with all seeds, print the figures, and draw the chart."""
    given = _arguments()
    topology, runs = _starting_in(given.start, parse_topology(described(llama=given.llama))), []
    pace = generations.measured() if given.llama else None
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        for seed in given.seeds:
            searched, scene = (_scene(given, seed, warm, pace) for warm in (0.0, given.warm))
            for name in given.side or SIDES:
                shown = bar.add_task(f"{name}, seed {seed}", total=given.seconds + given.warm)
                progress = partial(_advance, bar, shown)
                one = side(name, searched, topology)
                runs.append(run(one, scene, topology, progress))
                _say(runs[-1], given.json)
    if not given.json:
        Console(width=None if sys.stdout.isatty() else 200).print(table(runs))
    console.print(verdict(runs), agreement(runs, ALIKE if pace is None else SHARED), sep="\n")
    bars = [Bar(group[0].side, [one.score for one in group], own=group[0].side == OURS) for group in grouped(runs)]
    panel = Panel("Score", "USD", bars, "Cost and penalties: lower is better.")
    about = f"{given.seconds:g} s after {given.warm:g} s, seeds {given.seeds}, commit {machine()['commit']}"
    write_chart(given.chart, "A real autoscaled fleet under a plan and under static splits", about, [panel])


def _scene(given: argparse.Namespace, seed: int, warm: float, pace: generations.Pace | None) -> Scene:
    models: Mapping[str, Asked] = MODELS if pace is None else {**MODELS, generations.STORY: generations.STORIES}
    trace = requests(given.seconds, seed, warm=warm, models=models)
    return Scene(trace, given.seconds, warm, seed, COLD if given.cold else LIGHT, pace)


def _starting_in(seconds: float | None, topology: Topology) -> Topology:
    """The topology whose workers take so long to start."""
    if seconds is None:
        return topology
    hardware = {
        name: msgspec.structs.replace(one, scaling=msgspec.structs.replace(one.scaling, start=seconds))
        for name, one in topology.hardware.items()
    }
    return msgspec.structs.replace(topology, hardware=hardware)


def _say(made: Run, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(msgspec.json.encode({**msgspec.to_builtins(made), **machine()}).decode() + "\n")
        sys.stdout.flush()


def _advance(bar: Progress, shown: TaskID, done: float) -> None:
    bar.update(shown, completed=done)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.trial_fleet", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--start", type=float, help="seconds of a worker's start in the simulator (queues.yaml's)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"length of a run ({SECONDS})")
    parser.add_argument("--warm", type=float, default=0.0, help="seconds of earlier requests that do not count (0)")
    parser.add_argument("--cold", action="store_true", help="models take seconds to load, and do not all fit a device")
    parser.add_argument("--llama", action="store_true", help="have a model that llama.cpp computes, too")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[7, 8, 9])
    parser.add_argument("--side", action="append", choices=SIDES, help="all, unless named")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run")
    parser.add_argument("--chart", type=Path, default=CHARTS / "trial_fleet.html", help="where the chart is written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
