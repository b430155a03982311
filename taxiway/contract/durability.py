"""When a message is accepted: what a Valkey broker is asked after it was written, and what its refusals mean.

`written` is in the broker's memory and on its way to its log, as its `appendfsync` says. `replicated` is in a replica's
memory as well: a failover to that replica loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from taxiway.errors import BrokerFullError, BrokerUnavailableError, FleetUnavailable

Durability = Literal["written", "replicated"]

_FULL = "command not allowed when used memory"  # how the server says so; redis-py takes the code before it away
_UNWRITTEN = "MISCONF"  # how it says that it cannot write its log or its snapshot


def confirming(durability: Durability, patience: float) -> tuple[tuple[str | int, ...], ...]:
    """The command that confirms what was written before on the same connection, within `patience` seconds, if any.

    A replica is asked for its memory, not for its disk (WAITAOF): it tells of that once a second.
    """
    return (("WAIT", 1, int(patience * 1000)),) if durability == "replicated" else ()


def outlasting(durability: Durability, patience: float) -> tuple[str | int, ...]:
    """The command that waits, for `patience` seconds at most, until what was written before is kept.

    That is on the server's disk, or at a replica. An answer is not enough: while its disk is busy, a server that
    flushes its log every second answers before it has written there.
    """
    milliseconds = int(patience * 1000)
    return ("WAIT", 1, milliseconds) if durability == "replicated" else ("WAITAOF", 1, 0, milliseconds)


def outlasted(answer: Any) -> bool:
    """Whether `outlasting` was answered in time, and by a server that keeps anything."""
    if isinstance(answer, Exception):
        return False
    kept: int = answer[0] if isinstance(answer, list) else answer
    return kept > 0


def check_confirmed(answers: Sequence[Any]) -> None:
    """Raise what the answers to `confirming` say is missing.

    Raises:
        BrokerUnavailableError: no replica has it. It may be run all the same.
    """
    for replicas in answers:
        if isinstance(replicas, Exception):
            raise refusal("broker", replicas)
        if replicas < 1:
            message = "the broker took the request, and no replica said in time that it has it; it may run all the same"
            raise BrokerUnavailableError(message, retry_after=1.0)


def takes_nothing(error: BaseException) -> bool:
    """Whether the server answered that it takes no writes: then the call changed nothing."""
    return any(text in str(error) for text in (_FULL, _UNWRITTEN))


def refusal(server: str, error: BaseException) -> FleetUnavailable:
    """Our error for what a client library raised, or a server answered."""
    if _FULL in str(error):
        message = f"the {server}'s memory is full: it takes nothing until jobs or results end"
        return BrokerFullError(message, retry_after=5.0)
    if _UNWRITTEN in str(error):
        message = f"the {server} cannot write to its disk and takes nothing: make room there ({error})"
        return BrokerFullError(message, retry_after=5.0)
    return BrokerUnavailableError(f"the {server} does not answer: {error}", retry_after=1.0)
