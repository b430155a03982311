"""What processes report of themselves (heartbeats, catalogues), and what they are asked to serve and to follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from broker.valkey import Call
from tasks.models.folder import Watched
from taxiway.contract.keys import CATALOGUES, CATALOGUES_SEEN, DEVICES, HEARTBEATS, PLAN


def heartbeat_call(worker: str, facts: bytes) -> Call:
    """Publishes a device's facts under the server's time; without facts, removes the device."""
    return Call("fleet/heartbeat", [DEVICES, HEARTBEATS], [worker, facts])


def plan_call(before: bytes, plan: bytes) -> Call:
    """Replaces the stored plan if it is still `before`, empty if there was none; answers 1 if so, else 0."""
    return Call("fleet/replace", [PLAN], [before, plan])


def watch_call(arguments: Sequence[str | bytes]) -> Call:
    """Reports what a process serves, as a `Reporter` has it; `watch_answer` reads the answer."""
    return Call("fleet/watch", [CATALOGUES, CATALOGUES_SEEN], arguments)


def watch_answer(answer: Sequence[Any]) -> Watched:
    """Whether the store has this process's report, and its time."""
    known, now = answer
    return Watched(bool(known), float(now))
