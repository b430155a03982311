"""When a message counts as accepted: the commands that confirm a write to Valkey, and the errors it may return.

`written`: in the broker's memory, and in its log as its `appendfsync` says. `replicated`: also in a replica's memory,
so a failover to that replica loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from taxiway.errors import BrokerFullError, BrokerUnavailableError, FleetUnavailable

Durability = Literal["written", "replicated"]

_FULL = "command not allowed when used memory"  # from the server's error text; redis-py strips the code before it
_UNWRITTEN = "MISCONF"  # error code: the server cannot write its log or its snapshot


def confirming(durability: Durability, patience: float) -> tuple[tuple[str | int, ...], ...]:
    """The commands, if any, that confirm earlier writes on the same connection within `patience` seconds.

    They wait for a replica's memory (WAIT), not its disk (WAITAOF): replicas report the latter once a second.
    """
    return (("WAIT", 1, int(patience * 1000)),) if durability == "replicated" else ()


def outlasting(durability: Durability, patience: float) -> tuple[str | int, ...]:
    """The command that waits, at most `patience` seconds, until earlier writes are on disk or at a replica.

    An ordinary answer is not enough: a server that flushes its log every second answers before the write is on disk.
    """
    milliseconds = int(patience * 1000)
    return ("WAIT", 1, milliseconds) if durability == "replicated" else ("WAITAOF", 1, 0, milliseconds)


def outlasted(answer: Any) -> bool:
    """Whether `outlasting` was answered in time, by a server that persists its data."""
    if isinstance(answer, Exception):
        return False
    kept: int = answer[0] if isinstance(answer, list) else answer
    return kept > 0


def check_confirmed(answers: Sequence[Any]) -> None:
    """Raise if the answers to `confirming` lack a confirmation.

    Raises:
        BrokerUnavailableError: no replica confirmed the request. It may still run.
    """
    for replicas in answers:
        if isinstance(replicas, Exception):
            raise refusal("broker", replicas)
        if replicas < 1:
            message = "the broker accepted the request, but no replica confirmed it in time; it may still run"
            raise BrokerUnavailableError(message, retry_after=1.0)


def takes_nothing(error: BaseException) -> bool:
    """Whether the server refused writes: then the call changed nothing."""
    return any(text in str(error) for text in (_FULL, _UNWRITTEN))


def refusal(server: str, error: BaseException) -> FleetUnavailable:
    """Our error for a client library's exception or a server's error reply."""
    if _FULL in str(error):
        message = f"the {server}'s memory is full: it accepts no writes until jobs or results expire"
        return BrokerFullError(message, retry_after=5.0)
    if _UNWRITTEN in str(error):
        message = f"the {server} cannot write to its disk and accepts no writes: free disk space there ({error})"
        return BrokerFullError(message, retry_after=5.0)
    return BrokerUnavailableError(f"the {server} does not answer: {error}", retry_after=1.0)
