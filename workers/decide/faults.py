"""Classifies failures, and decides whether and when a job runs again after a device fault. Pure.

A table separates device faults from request errors. A device that is out of memory may recover. A device that is lost,
or whose context is broken, is unusable in this process: the worker exits, and its jobs run elsewhere.

Retries are limited to a tenth of a worker's answers plus a few per worker, which bounds them for a class too. A device
on which everything fails soon stops retrying.

Whether an endpoint gets work is decided by a circuit breaker. It opens when the endpoint cannot be reached, or after
`FAILURES` failures in a row of requests that reached it. While it is open, probes go out at growing intervals, or each
second to an endpoint that says that it is starting. The first that succeeds lets one request at a time through, and the
first answer closes it.

Source: the texts of CUDA's `cudaGetErrorString`, ONNX Runtime's arena and XLA's status codes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, StrEnum

from taxiway.backoff import Backoff
from taxiway.errors import MAX_ERROR


class Fault(Enum):
    """What is wrong with the device."""

    MEMORY = "out of memory"
    LOST = "lost"


class DeviceLostError(Exception):
    """This process can no longer use its device."""


_SIGNS: tuple[tuple[re.Pattern[str], Fault], ...] = (
    (re.compile(r"out of memory|RESOURCE_EXHAUSTED|Failed to allocate memory|bad.alloc", re.IGNORECASE), Fault.MEMORY),
    (
        re.compile(
            r"(?:CUDA|cuDNN|cuBLAS|HIP).*(?:illegal memory access|launch failure|device-side assert|unavailable|"
            r"ECC error|fallen off the bus|illegal instruction|misaligned address|hardware stack error)|"
            r"device (?:is )?lost",
            re.IGNORECASE | re.DOTALL,
        ),
        Fault.LOST,
    ),
)


_ADDRESS = re.compile(r"(<[^<>]*?)(?: object)? at 0x[0-9A-Fa-f]+(>)")


def text_of(error: BaseException) -> str:
    """An exception's text, without object addresses.

    A model's exception may fail to produce a text.
    """
    try:
        return _ADDRESS.sub(r"\1\2", str(error)[: 2 * MAX_ERROR])
    except BaseException as failure:
        return f"(its text cannot be read: {type(failure).__name__})"


def describe(error: BaseException) -> str:
    """The error's type and text."""
    return f"{type(error).__name__}: {text_of(error)}"


def fault_of(error: Exception) -> Fault | None:
    """The device fault behind a runtime's exception; None if it is not a device fault.

    A model's own errors differ only by their text, which a request may control. So only exception types of runtimes
    count; `ValueError`, `TypeError` and the like never do.
    """
    if isinstance(error, MemoryError):
        return Fault.MEMORY
    if not isinstance(error, RuntimeError) and "onnxruntime" not in type(error).__module__:
        return None
    return next((fault for sign, fault in _SIGNS if sign.search(describe(error))), None)


SHARE = 0.1
"""Retries that each answer allows."""

FLOOR = 10.0
"""Retries that a worker may make before its first answer."""

MOST_SAVED = 100.0
"""Maximum saved retries: a long time without faults does not allow a retry storm."""

RETRIES = Backoff(0.2, 30.0, spread=0.5)
"""Before a job runs again."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The retry budget: how many retries are available now."""

    tokens: float = FLOOR

    @property
    def allows(self) -> bool:
        """Whether one may be made."""
        return self.tokens >= 1

    def earned(self, answers: int) -> Budget:
        """The budget after that many answers."""
        return Budget(min(self.tokens + SHARE * answers, max(MOST_SAVED, self.tokens)))

    def spent(self) -> Budget:
        """The budget after one retry."""
        return Budget(self.tokens - 1)


FAILURES = 3
"""Failed requests in a row that open the breaker, while the endpoint answers probes."""

PROBES = Backoff(0.25, 5.0)
"""Before an open breaker is probed; each time it opens again counts."""

STARTING_PROBE = 1.0
"""Seconds between two probes of an endpoint that says that it is starting."""


class State(StrEnum):
    """What may pass: all, nothing, or one request at a time."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Breaker:
    """The state, and why it is open. A new one is open until the first probe.

    `failures` and `openings` count what happened since the last answer; each probe that succeeds while it is half-open
    takes an opening back, so that an outage after a long calm begins with a short pause. `probe_at` is when the next
    probe is due while it is open, on the caller's clock.
    """

    state: State = State.OPEN
    reason: str = "not probed yet"
    probe_at: float = 0.0
    failures: int = 0
    openings: int = 0

    def slots(self, slots: int) -> int:
        """How many requests may run, given `slots` slots."""
        return {State.CLOSED: slots, State.OPEN: 0, State.HALF_OPEN: 1}[self.state]

    def answered(self) -> Breaker:
        """After a request that was answered. One that began before the breaker opened does not close it."""
        return self if self.state is State.OPEN else Breaker(State.CLOSED, "")

    def failed(self, reason: str, now: float) -> Breaker:
        """After a request that reached the endpoint, and failed there."""
        failures = self.failures + 1
        if self.state is State.CLOSED and failures < FAILURES:
            return Breaker(State.CLOSED, "", failures=failures)
        return self.unreached(reason, now)

    def unreached(self, reason: str, now: float) -> Breaker:
        """After a probe that failed, or a request that could not be sent."""
        if self.state is State.OPEN and now < self.probe_at:  # requests that were in flight add nothing new
            return self
        openings = self.openings + 1
        return Breaker(State.OPEN, reason, now + PROBES.pause(openings), self.failures, openings)

    def starting(self, reason: str, now: float) -> Breaker:
        """After an answer that the endpoint has not loaded its model yet."""
        if self.state is State.OPEN and now < self.probe_at:
            return self
        return Breaker(State.OPEN, reason, now + STARTING_PROBE, self.failures, max(self.openings, 1))

    def probed(self) -> Breaker:
        """After a probe that succeeded."""
        if self.state is State.CLOSED:
            return self
        openings = self.openings if self.state is State.OPEN else max(self.openings - 1, 1)
        return Breaker(State.HALF_OPEN if openings else State.CLOSED, "", 0.0, self.failures, openings)
