"""Staged rollouts of a change of images, models or queues.yaml: stage after stage, watched, and rolled back if harmful.

Kubernetes replaces the pods of a Deployment whose template has changed, unless it is paused. All Deployments of a fleet
are paused except those of one stage. A change is *pending* while Deployments still change. A stage is *rolling* until
its pods have the new template and are ready, with their models loaded, then *watching* while they serve, and then the
next stage rolls. The first stage is the canary: a hardware class, or a share of its pods. The last one has the routers.
If new pods fail more jobs or take longer than earlier ones, or do not become ready, all changed Deployments are
*returning* to their earlier template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

Phase = Literal["idle", "pending", "rolling", "watching", "returning"]

STILL = 5.0
"""Seconds without a further change after which a change rolls: Deployments are changed one after another."""


@dataclass(frozen=True, slots=True)
class RolloutLimits:
    """The limits of new pods.

    They have `timeout` seconds to become ready, and serve for `watch` seconds before the next stage. Once they have had
    `jobs` jobs, the failing share may exceed the earlier one by `errors`, and the mean run time may be `latency` times
    the earlier one.
    """

    watch: float = 60.0
    timeout: float = 1800.0
    jobs: int = 20
    errors: float = 0.05
    latency: float = 2.0


@dataclass(frozen=True, slots=True)
class JobFigures:
    """Jobs that ended, those that failed among them, and the seconds that they ran."""

    jobs: int = 0
    failed: int = 0
    seconds: float = 0.0

    def plus(self, other: JobFigures) -> JobFigures:
        """The sum of both."""
        return JobFigures(self.jobs + other.jobs, self.failed + other.failed, self.seconds + other.seconds)


@dataclass(frozen=True, slots=True)
class DeployedPart:
    """A Deployment's template and that of most of its pods, by their digests.

    Of its `asked` pods, `updated` have its template, and `ready` of these are ready; `old` pods of other templates are
    left. `runs` is empty for a Deployment that never had pods.
    """

    wants: str
    runs: str
    asked: int = 0
    updated: int = 0
    ready: int = 0
    old: int = 0

    @property
    def rolled(self) -> bool:
        """Whether all its pods have its template and are ready."""
        return self.wants == self.runs and self.old == 0 and self.ready >= self.asked


@dataclass(frozen=True, slots=True)
class Stage:
    """Deployments that roll together, and the share of their pods after which they are watched first."""

    parts: tuple[str, ...]
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Rollout:
    """The phase since a time; `before` and `target` are the templates of each part, `why` is the last outcome."""

    phase: Phase = "idle"
    stage: int = 0
    since: float = 0.0
    before: Mapping[str, str] | None = None
    target: Mapping[str, str] | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """The new state, the parts that are not paused, and those that get their earlier template back."""

    rollout: Rollout
    open: frozenset[str] = frozenset()
    restore: frozenset[str] = frozenset()


def judge(before: JobFigures, after: JobFigures, limits: RolloutLimits) -> str:
    """Why new pods are worse than before; empty if they are not, or have had too few jobs to tell."""
    if after.jobs < limits.jobs:
        return ""
    failing, usual = after.failed / after.jobs, before.failed / max(before.jobs, 1)
    if failing > usual + limits.errors:
        return f"{failing:.0%} of {after.jobs} jobs failed, {usual:.0%} before"
    took, took_before = after.seconds / after.jobs, before.seconds / max(before.jobs, 1)
    if before.jobs >= limits.jobs and took > took_before * limits.latency:
        return f"jobs ran {took:.3g} s, {took_before:.3g} s before"
    return ""


def advance(
    rollout: Rollout,
    stages: Sequence[Stage],
    parts: Mapping[str, DeployedPart],
    harm: str,
    now: float,
    limits: RolloutLimits,
) -> RolloutStep:
    """The next step; `harm` is `judge`'s reason for the pods changed so far.

    A part that never had pods, as in a new fleet or a new class, is never paused until it has them.
    """
    fresh = frozenset(name for name, part in parts.items() if not part.runs)
    step = _advance(rollout, stages, {name: part for name, part in parts.items() if part.runs}, harm, now, limits)
    return replace(step, open=step.open | fresh)


def _advance(
    rollout: Rollout,
    stages: Sequence[Stage],
    parts: Mapping[str, DeployedPart],
    harm: str,
    now: float,
    limits: RolloutLimits,
) -> RolloutStep:
    if rollout.phase == "idle" or _is_new(rollout, parts):
        return _begin(rollout, parts, now)
    if rollout.phase == "pending":
        still = now >= rollout.since + STILL
        return _next(replace(rollout, phase="rolling"), stages, parts, now) if still else RolloutStep(rollout)
    if rollout.phase == "returning":
        return _return(rollout, parts, now, limits)
    if harm:
        return _return(replace(rollout, phase="returning", since=now, why=harm), parts, now, limits)
    if rollout.phase == "watching":
        after = replace(rollout, stage=rollout.stage + 1)
        return RolloutStep(rollout) if now < rollout.since + limits.watch else _next(after, stages, parts, now)
    return _roll(rollout, stages, parts, now, limits)


def _roll(
    rollout: Rollout, stages: Sequence[Stage], parts: Mapping[str, DeployedPart], now: float, limits: RolloutLimits
) -> RolloutStep:
    """Keep a stage open until it has changed; a stage without pods is not watched."""
    stage = stages[rollout.stage] if rollout.stage < len(stages) else Stage(())
    names = frozenset(stage.parts) & parts.keys()
    if all(_has_changed(parts[name], stage.share) for name in names):
        if any(parts[name].updated for name in names):
            return RolloutStep(replace(rollout, phase="watching", since=now))
        return _next(replace(rollout, stage=rollout.stage + 1), stages, parts, now)
    if now >= rollout.since + limits.timeout:
        why = f"{', '.join(sorted(names))}: not ready after {limits.timeout:g} s"
        return _return(replace(rollout, phase="returning", since=now, why=why), parts, now, limits)
    return RolloutStep(rollout, names)


def _is_new(rollout: Rollout, parts: Mapping[str, DeployedPart]) -> bool:
    """Whether a part has a template that is not of this rollout: it was changed meanwhile."""
    target, before = rollout.target or {}, rollout.before or {}
    return any(part.wants not in (target.get(name), before.get(name)) for name, part in parts.items())


def _has_changed(part: DeployedPart, share: float) -> bool:
    return part.rolled or (share < 1.0 and part.asked > 0 and part.ready >= ceil(part.asked * share))


def _begin(rollout: Rollout, parts: Mapping[str, DeployedPart], now: float) -> RolloutStep:
    """Begin a rollout of what has changed; one in progress restarts, from the templates before it."""
    if rollout.phase == "idle" and all(part.wants == part.runs for part in parts.values()):
        return RolloutStep(rollout, frozenset(name for name, part in parts.items() if part.old))
    earlier = (rollout.before or {}) if rollout.phase != "idle" else {}
    before = {name: earlier.get(name, part.runs) for name, part in parts.items()}
    target = {name: part.wants for name, part in parts.items()}
    return RolloutStep(Rollout("pending", 0, now, before, target))


def _next(rollout: Rollout, stages: Sequence[Stage], parts: Mapping[str, DeployedPart], now: float) -> RolloutStep:
    """The next stage that has something to change, or the end."""
    for index in range(rollout.stage, len(stages)):
        names = frozenset(stages[index].parts) & parts.keys()
        if not all(_has_changed(parts[name], stages[index].share) for name in names):
            return RolloutStep(replace(rollout, phase="rolling", stage=index, since=now), names)
    return RolloutStep(Rollout("idle", since=now, why="done"))


def _return(rollout: Rollout, parts: Mapping[str, DeployedPart], now: float, limits: RolloutLimits) -> RolloutStep:
    """Restore every part's earlier template, and roll the parts that have pods of the new one."""
    before = rollout.before or {}
    restore = frozenset(name for name, part in parts.items() if part.wants != before.get(name, part.wants))
    if not restore and all(part.rolled for part in parts.values()):
        return RolloutStep(Rollout("idle", since=now, why=f"rolled back: {rollout.why}"))
    if not restore and now >= rollout.since + limits.timeout:
        return RolloutStep(Rollout("idle", since=now, why=f"rolled back, but not all pods are ready: {rollout.why}"))
    return RolloutStep(rollout, frozenset(name for name, part in parts.items() if not part.rolled), restore)
