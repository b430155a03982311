"""How long an endpoint takes, learned from its answers: seconds to the first token, and for each further one. Pure.

The first token's time depends on the prompt and on what runs beside it, a further token's on what runs beside it: two
linear laws, each fitted to the recent answers by relative least squares. Where the answers say nothing, such as of
prompts longer than any so far, the profile holds, times the ratio of what was observed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.models.catalogue import Profile

ENOUGH = 5
"""Answers before what was learned is used in place of the profile."""

_KEEP = 0.97  # decay of the sums per answer: about the last thirty count
_RATIO = 0.1  # weight of the newest answer in the ratio, once there are ten
_OUTLIER = 4.0  # times the current ratio: cap of a single answer's effect on it
_ANCHOR = 0.1  # weight of each point at which the profile holds, an answer weighing 1 on average
_SHORT, _LONG = 16.0, 4096.0  # tokens of the prompts at these points
_LEAST = 1e-6  # seconds

Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Law:
    """Sums over the recent observations of one law: `gram` and `moment` are of its normal equations.

    `ratio` is observed over predicted by the profile, and `count` all observations.
    """

    gram: Numbers = ()
    moment: Numbers = ()
    ratio: float = 1.0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Learned:
    """What the answers of one variant on one endpoint tell."""

    first: Law = Law()
    each: Law = Law()


def after(
    learned: Learned, profile: Profile, *, read: float, written: float, rows: float, first: float, seconds: float
) -> Learned:
    """What is learned after one more answer.

    Args:
        learned: what was learned before.
        profile: the one to start from.
        read: tokens of the prompt.
        written: tokens of the answer.
        rows: the requests that ran at the same time, on average.
        first: seconds until the first part of the answer; all of them where nothing was streamed.
        seconds: all seconds.
    """
    step, slope = profile.of_prompt
    law = _observed(learned.first, (1.0, read, read * rows), (profile.base, step, slope), first)
    if written <= 1 or seconds <= first:
        return Learned(law, learned.each)
    each = _observed(learned.each, (1.0, rows), (profile.step, profile.slope), (seconds - first) / (written - 1))
    return Learned(law, each)


def curve_of(learned: Learned, profile: Profile, slots: int) -> Profile:
    """The profile as the answers have corrected it; the one to start from until there are enough.

    Only the other law's terms are left as they are while there are too few observations of one.
    """
    base, prompt_step, prompt_slope = profile.base, *profile.of_prompt
    if learned.first.count >= ENOUGH:
        points = [(1.0, read, read * rows) for read in (_SHORT, _LONG) for rows in (1.0, float(slots))]
        base, prompt_step, prompt_slope = _solved(learned.first, (base, prompt_step, prompt_slope), points)
    step, slope = profile.step, profile.slope
    if learned.each.count >= ENOUGH:
        step, slope = _solved(learned.each, (step, slope), [(1.0, 1.0), (1.0, float(slots))])
    return Profile(
        base=base, slope=slope, step=step, load=profile.load, prompt_step=prompt_step, prompt_slope=prompt_slope
    )


def _observed(law: Law, features: Numbers, prior: Numbers, seconds: float) -> Law:
    seconds = max(seconds, _LEAST)
    weight = seconds**-2
    size = len(features)
    gram = law.gram or (0.0,) * (size * size)
    moment = law.moment or (0.0,) * size
    outer = [one * other for one in features for other in features]
    predicted = max(_dot(prior, features), _LEAST)
    count = law.count + 1
    counted = seconds / predicted if count == 1 else min(seconds / predicted, _OUTLIER * law.ratio)
    return Law(
        tuple(_KEEP * had + weight * more for had, more in zip(gram, outer, strict=True)),
        tuple(_KEEP * had + weight * seconds * one for had, one in zip(moment, features, strict=True)),
        max(law.ratio + max(_RATIO, 1 / count) * (counted - law.ratio), _LEAST),
        count,
    )


def _solved(law: Law, prior: Numbers, points: Sequence[Numbers]) -> list[float]:
    """The law's coefficients, none of them negative; at `points` the prior counts, times the law's ratio."""
    size = len(prior)
    gram, moment = np.array(law.gram).reshape(size, size), np.array(law.moment)
    scaled = [law.ratio * one for one in prior]
    usual = law.gram[0] / min(law.count, 1 / (1 - _KEEP))  # an observation's weight: the first feature is 1
    for point in points:
        at, seconds = np.array(point), max(_dot(scaled, point), _LEAST)
        weight = _ANCHOR * min(seconds**-2, usual)
        gram = gram + weight * np.outer(at, at)
        moment = moment + weight * seconds * at
    kept, found = list(range(size)), np.zeros(size)
    while kept:
        part = np.linalg.lstsq(gram[np.ix_(kept, kept)], moment[kept], rcond=None)[0]
        if part.min() >= 0:
            found[kept] = part
            break
        kept.pop(int(part.argmin()))
    return [float(one) for one in found]


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
