"""What an endpoint's answers teach: how long it takes, and how much may be sent to it. Pure.

How long: seconds to the first token, and for each further one. The first token's time depends on the prompt and on what
runs beside it, a further token's on what runs beside it: two linear laws, each fitted to the recent answers by relative
least squares. Where nothing was observed, such as for prompts longer than any so far, the profile applies, times the
ratio of observed to predicted seconds.

How much: token buckets of requests and tokens per minute. The limits in queues.yaml and those in the endpoint's answers
both apply. A limit is capacity, not an error: the worker fetches only what it may send.

Source of the headers: https://platform.openai.com/docs/guides/rate-limits (`x-ratelimit-*`); other providers use them,
too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tasks.heartbeat import Allowed
from tasks.models.model import Profile

ENOUGH = 5
"""Answers before the learned curve replaces the profile."""

_KEEP = 0.97  # decay of the sums per answer: about the last thirty count
_RATIO = 0.1  # weight of the newest answer in the ratio, once there are ten
_OUTLIER = 4.0  # times the current ratio: cap of a single answer's effect on it
_ANCHOR = 0.1  # weight of each point at which the profile holds, an answer weighing 1 on average
_SHORT, _LONG = 16.0, 4096.0  # tokens of the prompts at these points
_SHORTEST_STEP = 1e-6  # seconds

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
    """What the answers of one variant on one endpoint have taught."""

    first: Law = Law()
    each: Law = Law()


def after(
    learned: Learned, profile: Profile, *, read: float, written: float, rows: float, first: float, seconds: float
) -> Learned:
    """The state after one more answer.

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
    seconds = max(seconds, _SHORTEST_STEP)
    weight = seconds**-2
    size = len(features)
    gram = law.gram or (0.0,) * (size * size)
    moment = law.moment or (0.0,) * size
    outer = [one * other for one in features for other in features]
    predicted = max(_dot(prior, features), _SHORTEST_STEP)
    count = law.count + 1
    counted = seconds / predicted if count == 1 else min(seconds / predicted, _OUTLIER * law.ratio)
    return Law(
        tuple(_KEEP * had + weight * more for had, more in zip(gram, outer, strict=True)),
        tuple(_KEEP * had + weight * seconds * one for had, one in zip(moment, features, strict=True)),
        max(law.ratio + max(_RATIO, 1 / count) * (counted - law.ratio), _SHORTEST_STEP),
        count,
    )


def _solved(law: Law, prior: Numbers, points: Sequence[Numbers]) -> list[float]:
    """The law's coefficients, none of them negative; at `points` the prior counts, times the law's ratio."""
    size = len(prior)
    gram, moment = np.array(law.gram).reshape(size, size), np.array(law.moment)
    scaled = [law.ratio * one for one in prior]
    usual = law.gram[0] / min(law.count, 1 / (1 - _KEEP))  # an observation's weight: the first feature is 1
    for point in points:
        at, seconds = np.array(point), max(_dot(scaled, point), _SHORTEST_STEP)
        weight = _ANCHOR * min(seconds**-2, usual)
        gram = gram + weight * np.outer(at, at)
        moment = moment + weight * seconds * at
    return [float(one) for one in non_negative(gram, moment)]


def non_negative(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The solution of normal equations, without the terms that would be negative."""
    kept, found = list(range(len(moment))), np.zeros(len(moment))
    while kept:
        part = np.linalg.lstsq(gram[np.ix_(kept, kept)], moment[kept], rcond=None)[0]
        if part.min() >= 0:
            found[kept] = part
            break
        kept.pop(int(part.argmin()))
    return found


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


MINUTE = 60.0

_LARGEST_FIGURE = 1e12
"""Largest figure that a header may state; a larger one is taken for none."""

_ROUNDING = 1e-9
"""Part of a bucket's capacity that rounding may hide."""

_DURATION = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6}(?:\.\d{1,9})?)s)?(?:(\d{1,9}(?:\.\d{1,9})?)ms)?")
_FIGURE = re.compile(r"\d{1,13}(?:\.\d{1,9})?")


@dataclass(frozen=True, slots=True)
class Bucket:
    """`level` of at most `capacity` at the time `at`, growing by `rate` per second. It may be overdrawn."""

    capacity: float
    rate: float
    level: float
    at: float

    def left(self, now: float) -> float:
        """What may be taken now."""
        return min(self.capacity, self.level + self.rate * max(now - self.at, 0.0))

    def taken(self, amount: float, now: float) -> Bucket:
        """The bucket after `amount` was taken; a negative one was given back."""
        return replace(self, level=min(self.left(now) - amount, self.capacity), at=max(now, self.at))

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken. What is more than the capacity may be taken from a full bucket.

        A bucket that lacks no more than rounding has enough: a wait so short is none on any clock.
        """
        lacking = min(amount, self.capacity) - self.left(now)
        return lacking / self.rate if lacking > _ROUNDING * self.capacity else 0.0


@dataclass(frozen=True, slots=True)
class EndpointRates:
    """What an endpoint allows; None if unlimited."""

    requests: Bucket | None = None
    tokens: Bucket | None = None

    def wait(self, tokens: float, now: float) -> float:
        """Seconds until a request of that many tokens may be sent."""
        waits = [bucket.wait(amount, now) for bucket, amount in self._both(1.0, tokens)]
        return max(waits, default=0.0)

    def since(self, now: float) -> EndpointRates:
        """The same on a clock that is 0 now."""
        begun = (each and replace(each, level=each.left(now), at=0.0) for each in (self.requests, self.tokens))
        return EndpointRates(*begun)

    def free(self, tokens: float, now: float) -> float:
        """How many requests of that many tokens may be sent now; infinite if nothing is limited."""
        free = [
            bucket.left(now) / min(max(amount, 1e-9), bucket.capacity) for bucket, amount in self._both(1.0, tokens)
        ]
        return max(min(free, default=math.inf), 0.0)

    def taken(self, tokens: float, now: float, *, requests: float = 1.0) -> EndpointRates:
        """The rates after requests with that many tokens were sent; negative amounts are given back."""
        return EndpointRates(
            None if self.requests is None else self.requests.taken(requests, now),
            None if self.tokens is None else self.tokens.taken(tokens, now),
        )

    def allowed(self, now: float, devices: int = 1) -> Allowed | None:
        """What the heartbeat of one of so many devices says of them; None without limits."""
        if self == EndpointRates():
            return None
        (requests, left), (tokens, tokens_left) = (
            (None, 0.0) if bucket is None else (bucket.rate / devices, bucket.left(now) / devices)
            for bucket in (self.requests, self.tokens)
        )
        return Allowed(requests=requests, requests_left=left, tokens=tokens, tokens_left=tokens_left)

    def _both(self, requests: float, tokens: float) -> list[tuple[Bucket, float]]:
        pairs = ((self.requests, requests), (self.tokens, tokens))
        return [(bucket, amount) for bucket, amount in pairs if bucket is not None]


def rates_of(requests: float | None, tokens: float | None, now: float, endpoints: int = 1) -> EndpointRates:
    """The rates of `endpoints` endpoints, from the limits of one per minute, of which all is left."""
    limits = (None if each is None else each * endpoints for each in (requests, tokens))
    return EndpointRates(*(None if each is None else Bucket(each, each / MINUTE, each, now) for each in limits))


def learned(rates: EndpointRates, headers: Mapping[str, str], now: float) -> EndpointRates:
    """The rates after an answer with these headers, which may state limits, what is left of them, and until when."""
    return EndpointRates(
        _stated(rates.requests, headers, "requests", now), _stated(rates.tokens, headers, "tokens", now)
    )


def _stated(bucket: Bucket | None, headers: Mapping[str, str], kind: str, now: float) -> Bucket | None:
    limit = _figure(headers.get(f"x-ratelimit-limit-{kind}", ""))
    left = _figure(headers.get(f"x-ratelimit-remaining-{kind}", ""))
    if limit is not None and limit >= 1 and (bucket is None or limit < bucket.capacity):
        rate = limit / MINUTE if bucket is None else min(limit / MINUTE, bucket.rate)
        bucket = Bucket(limit, rate, limit if bucket is None else min(limit, bucket.left(now)), now)
    if bucket is None or left is None:
        return bucket
    known = bucket.taken(max(bucket.left(now) - left, 0.0), now)
    reset = duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
    if left < 1 and reset is not None:  # nothing is left until then, however the endpoint counts its minutes
        known = replace(known, level=min(known.level, 1.0 - known.rate * min(reset, MINUTE)))
    return known


def duration(text: str) -> float | None:
    """Seconds of a duration such as `6m0s`, `1.5s` or `20ms`, or of a number; None if it is neither."""
    if (seconds := _figure(text)) is not None:
        return seconds
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        return None
    hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * MINUTE + seconds + milliseconds / 1000


def _figure(text: str) -> float | None:
    if _FIGURE.fullmatch(text) is None:
        return None
    value = float(text)
    return value if value <= _LARGEST_FIGURE else None
