"""What processes say of themselves in the state store: a device's facts, and what is served from a models folder."""

from __future__ import annotations

from collections.abc import Sequence

from broker.valkey.lua import Call
from taxiway.contract.keys import CATALOGUES, CATALOGUES_SEEN, DEVICES, HEARTBEATS, RELOADS


def heartbeat_call(worker: str, facts: bytes) -> Call:
    """Publishes a device's facts under the server's time; without any, takes them back."""
    return Call("heartbeat", [DEVICES, HEARTBEATS], [worker, facts])


def watch_call(arguments: Sequence[str | bytes]) -> Call:
    """Reports what a process serves, as `tasks.reload.Reporter` has it, and asks how often a reload was asked for."""
    return Call("watch", [CATALOGUES, CATALOGUES_SEEN, RELOADS], arguments)
