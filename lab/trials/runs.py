"""One policy on one trial with one seed: where its trace comes from, and what the run tells."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import msgspec

from lab.baselines import EVERY_POLICY, as_seen
from lab.bounds.linear import NAME as LP
from lab.bounds.linear import lower_bound
from lab.bounds.whole_devices import NAME as WHOLE
from lab.bounds.whole_devices import whole_bound
from lab.changes import simulate
from lab.fleet_file import load_fleet, prepare
from lab.rows import read_trace
from lab.trials.trial import TRIALS
from lab.trials.warm import WarmPolicy
from simulator.engine import RunSummary
from simulator.policies.policy import LIVE, REFUSED_JOB, Held, Policy, Shift
from simulator.pool import Pool
from simulator.workload import SimulatedJob, Workload

OURS = "taxiway"

EARLIER = 100
"""The seed of a history is the trace's and this."""

WINDOW = 60.0
"""Seconds in which most of a model's live requests go to its first class."""

SEED = 1
"""Of policies, failures and searches. The trace has a seed of its own."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where traces come from: `folder`'s files by seed and trial, for others the trials' own requests.

    A trace with a fleet file beside it, of the same name, is played on that fleet. `data` is the folder of the Azure
    traces, which the trials' own language models arrive by if it is given.
    """

    folder: Path | None = None
    data: Path | None = None

    def workload(self, trial: str, seed: int) -> Workload:
        """The trial's workload."""
        written = None if self.folder is None else self.folder / str(seed) / f"{trial}.csv"
        if written is None or not written.exists():
            return TRIALS[trial].workload(TRIALS[trial].trace(seed, self.data))
        own = written.with_suffix(".yaml")
        fleet = load_fleet(own) if own.exists() else TRIALS[trial].fleet()
        return prepare(read_trace(written, model=fleet.default_model), fleet, seed=1)


def write_traces(recipes: Iterable[Path], folder: Path, seeds: Iterable[int]) -> None:
    """Let each recipe write its traces for each seed."""
    for recipe, seed in product(recipes, seeds):
        command = [sys.executable, str(recipe), str(folder / str(seed)), "--seed", str(seed)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@dataclass(frozen=True, slots=True)
class Task:
    """A run to make; with `warm`, taxiway has a history."""

    source: Source
    trial: str
    seed: int
    policy: str
    warm: bool = False


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy attained and cost on a trial with a seed.

    `p99` is by service. `changes` counts, for each model, how often another class became the first one of its live
    requests.
    """

    trial: str
    seed: int
    policy: str
    attainment: dict[str, float | None]
    cost_usd: float
    score: float
    p99: dict[str, float | None] = {}
    starts_usd: float = 0.0
    idle_usd: float = 0.0
    moves: int = 0
    refused: int = 0
    live_by_model: dict[str, float] = {}
    changes: dict[str, int] = {}


class Watched(Policy):
    """A policy whose choices for live requests are recorded."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.queue, self.beat, self.yields = policy.queue, policy.beat, policy.yields
        self._chosen: dict[int, dict[int, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))

    def choose(self, job: SimulatedJob, pools: Sequence[Pool], now: float) -> int | Held:
        """As `Policy.choose`."""
        chosen = self._policy.choose(job, pools, now)
        place = chosen.pool if isinstance(chosen, Held) else chosen
        if job.service == LIVE and place != REFUSED_JOB:
            self._chosen[job.model][int(now // WINDOW)][place] += 1
        return chosen

    def look(self, pools: Sequence[Pool], now: float) -> Iterable[Shift]:
        """As `Policy.look`."""
        return self._policy.look(pools, now)

    def ended(self, job: SimulatedJob, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""
        self._policy.ended(job, pool, seconds)

    def changes(self, models: Sequence[str]) -> dict[str, int]:
        """By model, how often its first class was another than in the window before."""
        firsts = {model: [counts.most_common(1)[0][0] for counts in by.values()] for model, by in self._chosen.items()}
        return {models[model]: changes_in(places) for model, places in sorted(firsts.items())}


def changes_in(values: Sequence[int]) -> int:
    """How often a value differs from the one before."""
    return sum(former != latter for former, latter in pairwise(values))


def play(task: Task) -> Run:
    """Make a run. Its process needs nothing of the caller's."""
    workload = as_seen(task.source.workload(task.trial, task.seed), task.policy)
    if task.policy in BOUNDS:
        return _run(task, BOUNDS[task.policy](workload), {})
    if task.warm and task.policy == OURS:
        history = task.source.workload(task.trial, task.seed + EARLIER)
        watched = Watched(WarmPolicy(workload, history, seed=SEED))
    else:
        watched = Watched(EVERY_POLICY[task.policy](workload, SEED))
    summary = simulate(task.policy, workload, watched, seed=SEED)
    return _run(task, summary, watched.changes(workload.trace.models))


BOUNDS: Mapping[str, Callable[[Workload], RunSummary]] = {
    LP: lambda workload: lower_bound(workload).summary(),
    WHOLE: lambda workload: whole_bound(workload).summary(),
}
"""Lower bounds, as rows beside the policies."""


def _run(task: Task, summary: RunSummary, changes: Mapping[str, int]) -> Run:
    return Run(
        trial=task.trial,
        seed=task.seed,
        policy=task.policy,
        attainment=summary.attainment,
        cost_usd=summary.cost_usd,
        score=summary.score,
        p99=summary.p99_by_service,
        starts_usd=summary.starts_usd,
        idle_usd=summary.idle_usd,
        moves=summary.moves,
        refused=summary.refused,
        live_by_model=summary.live_by_model,
        changes=dict(changes),
    )
