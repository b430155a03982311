"""What unit tests may do: nothing outside their own process but read and write files."""

import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="module")
def refused() -> Iterator[list[str]]:
    """What was refused: each attempt to connect, to listen or to start a process."""
    attempts: list[str] = []

    def refuse(what: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            attempts.append(what)
            raise PermissionError(f"a unit test {what}")

        return fail

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "bind"):
            patch.setattr(socket.socket, name, refuse("opens a socket"))
        patch.setattr(subprocess.Popen, "__init__", refuse("starts a process"))
        patch.setattr(socket, "send_fds", refuse("starts a process"))  # as a fork (tests/forked.py)
        yield attempts


@pytest.fixture(autouse=True)
def alone(refused: list[str]) -> Iterator[None]:
    """Fails a test that tried, whatever the code that it tests made of the refusal."""
    refused.clear()
    yield
    if refused:
        pytest.fail(f"a unit test {refused[0]}: it belongs in tests/integration")
