"""How much may be sent to an endpoint that limits requests and tokens a minute: token buckets. Pure.

What queues.yaml says and what the endpoint's answers say both hold. Limits that are kept are no errors: the worker
fetches only what it may send.

Source of the headers: https://platform.openai.com/docs/guides/rate-limits (`x-ratelimit-*`), which others have, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

MINUTE = 60.0

_MOST = 1e12
"""Largest figure that a header may state; a larger one is taken for none."""

_DURATION = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6}(?:\.\d{1,9})?)s)?(?:(\d{1,9}(?:\.\d{1,9})?)ms)?")
_FIGURE = re.compile(r"\d{1,13}(?:\.\d{1,9})?")


@dataclass(frozen=True, slots=True)
class Bucket:
    """`level` of at most `capacity` at the time `at`, growing by `rate` a second. It may be overdrawn."""

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
        """Seconds until `amount` may be taken. What is more than the capacity may be taken from a full bucket."""
        lacking = min(amount, self.capacity) - self.left(now)
        return max(lacking / self.rate, 0.0)


def minute_bucket(each_minute: float, now: float) -> Bucket:
    """A full bucket of a limit for each minute."""
    return Bucket(each_minute, each_minute / MINUTE, each_minute, now)


@dataclass(frozen=True, slots=True)
class Rates:
    """What an endpoint allows, None where it is unlimited."""

    requests: Bucket | None = None
    tokens: Bucket | None = None

    def wait(self, tokens: float, now: float) -> float:
        """Seconds until a request of so many tokens may be sent."""
        waits = [bucket.wait(amount, now) for bucket, amount in self._both(1.0, tokens)]
        return max(waits, default=0.0)

    def room(self, tokens: float, now: float) -> float:
        """How many requests of so many tokens may be sent now; infinite if nothing is limited."""
        room = [
            bucket.left(now) / min(max(amount, 1e-9), bucket.capacity) for bucket, amount in self._both(1.0, tokens)
        ]
        return max(min(room, default=math.inf), 0.0)

    def taken(self, tokens: float, now: float, *, requests: float = 1.0) -> Rates:
        """After requests with so many tokens were sent; negative amounts are given back."""
        return Rates(
            None if self.requests is None else self.requests.taken(requests, now),
            None if self.tokens is None else self.tokens.taken(tokens, now),
        )

    def _both(self, requests: float, tokens: float) -> list[tuple[Bucket, float]]:
        pairs = ((self.requests, requests), (self.tokens, tokens))
        return [(bucket, amount) for bucket, amount in pairs if bucket is not None]


def begin(requests: float | None, tokens: float | None, now: float, endpoints: int = 1) -> Rates:
    """The rates that are stated for each minute and endpoint, over so many endpoints."""
    return Rates(*(None if each is None else minute_bucket(each * endpoints, now) for each in (requests, tokens)))


def learned(rates: Rates, headers: Mapping[str, str], now: float) -> Rates:
    """The rates after an answer with these headers, which may state limits, what is left of them, and until when."""
    return Rates(
        _stated(rates.requests, headers, "requests", now),
        _stated(rates.tokens, headers, "tokens", now),
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
    return value if value <= _MOST else None
