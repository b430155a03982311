"""What taxiway shall reach on the trials, held against runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lab.bounds.whole_devices import NAME as WHOLE
from lab.trials.runs import OURS, Run
from lab.trials.trial import LENGTH
from simulator.reports import percent

PLAN = "tuned-plan"

OPPONENTS = ("tuned-split", "pinned")
"""Of these, the better one of each seed counts."""

COLD: Mapping[str, float] = {"steady": 1.00, "drift": 0.95, "throttled": 0.90, "edge": 1.05}
WARM: Mapping[str, float] = {"steady": 0.85, "drift": 0.85, "throttled": 0.90, "edge": 1.00}
"""At most this share of the better opponents' mean score, without and with a history."""

OVER_BETTER = 1.00
"""The same of other trials."""

OVER_PLAN = 1.15
OVER_BOUND = 1.6

FLOOR, BEHIND = 0.90, 0.03
"""Each model's live attainment, or what it may be behind the better opponent's."""

EVERY = 240.0
"""Seconds in which a model's first class may change once, where nothing drifts."""

UNCHANGING = "steady"


@dataclass(frozen=True, slots=True)
class Target:
    """A target on a trial, and whether it holds; `because` has the figures."""

    trial: str
    target: str
    holds: bool
    because: str


class Scores:
    """The runs of one trial, by policy and seed; only seeds that taxiway was run with."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = {(run.policy, run.seed): run for run in runs}
        self.ours = [run for run in runs if run.policy == OURS]

    def others(self, policy: str) -> list[Run]:
        """The policy's runs, one for each of taxiway's; empty if one is missing."""
        found = [self._runs.get((policy, run.seed)) for run in self.ours]
        present = [run for run in found if run is not None]
        return present if len(present) == len(found) else []

    def better(self) -> list[Run]:
        """The better opponent of each seed; empty if opponents were left out."""
        columns = [self.others(name) for name in OPPONENTS]
        return [min(runs, key=lambda run: run.score) for runs in zip(*columns, strict=True)] if all(columns) else []

    def ratio(self, others: Sequence[Run]) -> float:
        """The mean score of taxiway over theirs."""
        return fmean(run.score for run in self.ours) / max(fmean(run.score for run in others), 1e-9)


def targets(trial: str, runs: Sequence[Run], *, warm: bool) -> Iterator[Target]:
    """Each target that the runs of one trial can tell of."""
    scores = Scores(runs)
    better = scores.better()
    most = (WARM if warm else COLD).get(trial, OVER_BETTER)
    if better:
        yield _at_most(trial, "the better of tuned-split and pinned", scores.ratio(better), most)
    for name, most in ((PLAN, OVER_PLAN), (WHOLE, OVER_BOUND)):
        if others := scores.others(name):
            yield _at_most(trial, name, scores.ratio(others), most)
    if better:
        yield _nobody_is_sacrificed(trial, scores.ours, better)
    if scores.ours and trial == UNCHANGING:
        yield _steadiness(trial, scores.ours)


def _at_most(trial: str, whom: str, ratio: float, most: float) -> Target:
    return Target(trial, f"score at most {most:.2f} of {whom}", ratio <= most, f"{ratio:.2f}")


def _nobody_is_sacrificed(trial: str, ours: Sequence[Run], better: Sequence[Run]) -> Target:
    starved = [
        f"{model} with seed {run.seed} {percent(live)} (the opponent {percent(other.live_by_model[model])})"
        for run, other in zip(ours, better, strict=True)
        for model, live in run.live_by_model.items()
        if live < min(FLOOR, other.live_by_model[model] - BEHIND)
    ]
    least = min((live, model) for run in ours for model, live in run.live_by_model.items())
    because = "; ".join(starved) or f"{least[1]} at least, {percent(least[0])}"
    return Target(trial, "each model's live work 90 %, or 3 points behind the opponent's", not starved, because)


def _steadiness(trial: str, ours: Sequence[Run]) -> Target:
    changes, model, seed = max((count, model, run.seed) for run in ours for model, count in run.changes.items())
    return Target(
        trial,
        "a model's first class changes at most once in 4 minutes",
        changes <= LENGTH / EVERY,
        f"at most {changes} times, {model} with seed {seed}",
    )
