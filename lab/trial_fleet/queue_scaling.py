"""Scaling on queue length, as KEDA does it, from what a router's HTTP API shows to operators."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from local.autoscaler import ask_router
from router.decide.plan import ClassSize, Depth
from tasks.web import ask

_QUICK = 1.0  # seconds for one answer of a router on loopback


class _Class(msgspec.Struct, frozen=True):
    depth: tuple[int, ...]
    running: int


class _Fleet(msgspec.Struct, frozen=True):
    classes: dict[str, _Class]


class QueueScaling:
    """How many devices each class should have: one per so many waiting and running jobs.

    Args:
        rule: jobs per device, seconds between two looks at the queue, and for which a device is kept.
        most: the most devices of each class.
    """

    def __init__(self, rule: Depth, most: Mapping[str, int]) -> None:
        self._rule = rule
        self._most = most
        self._size = {name: ClassSize(0.0) for name in most}
        self._target = dict.fromkeys(most, 0)
        self._polled = dict.fromkeys(most, float("-inf"))

    def __call__(self, url: str, key: str, name: str) -> int | None:
        """As `ask_router`, which learns that devices are started here, and whose own count is ignored."""
        ask_router(url, key, name)
        now = time.monotonic()
        if now - self._polled[name] >= self._rule.poll:
            self._polled[name] = now
            jobs = _unfinished(url, name)
            if jobs is not None:
                self.look(name, jobs, now)
        return self.target(name)

    def target(self, name: str) -> int:
        """The devices that the class should have."""
        return self._target[name]

    def look(self, name: str, jobs: int, now: float) -> None:
        """The class has so many unfinished jobs."""
        size, most = self._size[name], self._most[name]
        size.follow(self._rule)
        grown = size.grown(self._target[name], 0.0, jobs, now, most)
        self._target[name] = size.kept(grown, 0.0, jobs, now, most)


def _unfinished(url: str, name: str) -> int | None:
    with suppress(msgspec.MsgspecError):
        found = msgspec.json.decode(ask(f"{url}/v2/fleet", timeout=_QUICK) or b"", type=_Fleet).classes[name]
        return sum(found.depth) + found.running
    return None
