"""What a Valkey or Redis server answers instead of a value, and our words for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from taxiway.contract.durability import refusal

_AWAY = ("READONLY", "LOADING", "MASTERDOWN", "UNBLOCKED", "ERR max number of clients")


class ServerError(Exception):
    """An error that the server answered, in its words: its code first."""


def is_away(answer: Any) -> bool:
    """Whether the server answers that it is no primary, or not yet: another connection may reach one."""
    return isinstance(answer, ServerError) and str(answer).startswith(_AWAY)


def is_unknown_script(error: ServerError) -> bool:
    """Whether the server does not know a script by its digest: it was never loaded there, or has been forgotten."""
    return str(error).startswith("NOSCRIPT")


def checked(answers: Sequence[Any]) -> list[Any]:
    """The answers. Raises the first error among them."""
    for answer in answers:
        if isinstance(answer, ServerError):
            raise answer
    return [*answers]


class fleet_errors(AbstractContextManager[None]):
    """Raises a `FleetUnavailable`, naming `server`, for everything that says that it did not answer, or has no room.

    A class, because a generator takes 2 % of a call more.
    """

    __slots__ = ("_server",)

    def __init__(self, server: str) -> None:
        self._server = server

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (ServerError, OSError)):
            raise refusal(self._server, error) from error
