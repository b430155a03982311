"""The clients inside web frameworks, with the servers and event loops that these are run with."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.settings import TREE
from tests.routing import HTTP, EchoFleet, eventually

APPS = "tests.integration.client.webapps"
FASTAPI, FLASK, DJANGO = (f"{APPS}.{name}_app:app" for name in ("fastapi", "flask", "django"))

REQUESTS = 16
"""At once, of each view at each interface."""


@pytest.fixture(scope="module")
def interfaces(echo: EchoFleet) -> str:
    """The addresses of one fleet: its broker's and its router's."""
    return f"{echo.settings.broker} {echo.router.http}"


@contextmanager
def served(command: Sequence[str], app: str, log: Path, **environment: str) -> Iterator[str]:
    """The address of an application that a server serves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bound = ["--port", str(port)] if "uvicorn" in command else ["--bind", f"127.0.0.1:{port}"]
    env = {**os.environ, "PYTHONPATH": str(TREE), **environment}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command[:2], *bound, *command[2:], app], env=env, stdout=out, stderr=out
        )
    try:
        eventually(lambda: process.poll() is not None or _is_listening(port))
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _is_listening(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def answers(url: str, views: Sequence[str]) -> dict[str, set[str]]:
    """What each view at each interface answers to requests at once."""

    def ask(asked: tuple[str, int]) -> str:
        path, number = asked
        answer = HTTP.get(f"{url}/{path}", params={"text": str(number)}, timeout=60)
        return str(answer.json()) if answer.is_success else f"{answer.status_code}: {answer.text[:500]}"

    found = {}
    with ThreadPoolExecutor(REQUESTS) as pool:
        for path in (f"{interface}/{view}" for interface in ("redis", "http") for view in views):
            found[path] = set(pool.map(ask, [(path, number) for number in range(REQUESTS)]))
    return found


@pytest.mark.cases("command, app, views")
def test_a_client_at_module_level_answers_every_request(
    interfaces: str, command: Sequence[str], app: str, views: Sequence[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with served(command, app, log, ADDRESSES=interfaces) as url:
        found = answers(url, views)

    wanted = set(map(str, range(REQUESTS)))
    assert {path: texts ^ wanted for path, texts in found.items() if texts != wanted} == {}, log.read_text()
    assert log.read_text() == ""
