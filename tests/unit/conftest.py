"""What unit tests may do: nothing outside their own process but read and write files. Their tables."""

import socket
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import taxiway.errors

CASES = Path(__file__).parents[1] / "recorded" / "cases"


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each row of its table, where it is marked `cases(names)`, and for each that is given there.

    The table has the test's sentence as its name, in the file of its module in tests/recorded/cases/. There `$NAME` is
    what the module or taxiway.errors calls so, and `!bytes` stands before a text of bytes.
    """
    marked = metafunc.definition.get_closest_marker("cases")
    if marked is None:
        return
    *folders, module = metafunc.module.__name__.removeprefix("tests.unit.").split(".")
    tables = _tables(Path(*folders, module.removeprefix("test_")).with_suffix(".yaml"))
    rows = tables[metafunc.function.__name__.removeprefix("test_").replace("_", " ")]
    names, *further = marked.args
    known = vars(taxiway.errors) | vars(metafunc.module)
    metafunc.parametrize(names, [_resolved(row, known) for row in rows] + [row for some in further for row in some])


class _Loader(yaml.CSafeLoader):
    """YAML with bytes."""


_Loader.add_constructor("!bytes", lambda loader, node: node.value.encode("latin-1"))


@cache
def _tables(file: Path) -> dict[str, list[Any]]:
    return yaml.load((CASES / file).read_text(encoding="utf-8"), _Loader)


def _resolved(value: Any, names: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_resolved(one, names) for one in value]
    if isinstance(value, dict):
        return {key: _resolved(one, names) for key, one in value.items()}
    return names[value[1:]] if isinstance(value, str) and value.startswith("$") else value
