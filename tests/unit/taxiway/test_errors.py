import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.settings import TREE
from taxiway import errors
from taxiway.errors import (
    UNREADABLE,
    BrokerUnavailableError,
    ExecutionError,
    TaxiwayError,
    error_from,
    error_of_code,
    flaw,
    unreadable,
)


def kinds(root: type[TaxiwayError] = TaxiwayError) -> Iterator[type[TaxiwayError]]:
    if root.__module__ == errors.__name__:
        yield root
    for child in root.__subclasses__():
        yield from kinds(child)


KINDS = sorted(kinds(), key=lambda kind: kind.__name__)
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \| (\d+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def test_the_table_of_errors_has_every_error_with_its_code_status_and_exit_code() -> None:
    rows = ROW.findall((TREE / "docs" / "errors.md").read_text(encoding="utf-8"))
    documented = {(name, code, int(status), int(exit_code)) for name, code, status, exit_code, _when, _do in rows}
    assert documented == {(k.__name__, k.code, k.status, k.exit_code) for k in KINDS}
    assert len(rows) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_back_by_its_name_by_its_code_and_from_a_pickle(kind: type[TaxiwayError]) -> None:
    details = {"field": "deadline", "message": "kept", "self": 1}
    for error in (error_from(kind.__name__, "no", details), error_of_code(kind.code, "no", details)):
        assert type(error) is kind
        assert (error.message, str(error), error.details) == ("no", "no", details)
    error = pickle.loads(pickle.dumps(kind("no", retry_after=2.0)))
    assert (type(error), error.message, error.retry_after) == (kind, "no", 2.0)


def test_a_foreign_error_is_an_execution_error_and_an_unknown_code_the_base_class() -> None:
    class Narrower(BrokerUnavailableError):
        """Does not stand for its parent, whose code it has."""

    error = error_from("ZeroDivisionError", "division by zero")
    assert (type(error), error.message) == (ExecutionError, "ZeroDivisionError: division by zero")
    assert type(error_of_code("teapot", "no")) is TaxiwayError
    assert type(error_of_code(Narrower.code, "no")) is BrokerUnavailableError


def test_a_wait_that_ran_out_is_a_timeout_to_python_too() -> None:
    assert issubclass(errors.ResultTimeoutError, TimeoutError)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda: b"caf\xe9".decode(), "the byte 0xe9 at position 3"),
        (lambda: "\ud800".encode(), "a lone surrogate ('\\ud800') at character 0"),
        (lambda: Path("/nowhere/at/all").read_bytes(), "no such file or directory"),
        (lambda: Path("/").read_bytes(), "is a directory"),
    ],
)
def test_why_nothing_can_be_read_is_said_without_pythons_words(fault: Callable[[], object], said: str) -> None:
    with pytest.raises((OSError, UnicodeError)) as raised:
        fault()
    assert isinstance(raised.value, OSError | UnicodeError)
    assert flaw(raised.value) == said


class Part(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    size: Literal[1, 2] = 1
    by: dict[str, int] = {}


@pytest.mark.cases("text, field, message", [(b"[" * 10_000, "body", "body: expected JSON: ")])
def test_a_value_that_cannot_be_read_is_refused_with_the_field_first(text: bytes, field: str, message: str) -> None:
    with pytest.raises(UNREADABLE) as raised:
        msgspec.json.decode(text, type=list[Part] if text[:2] != b"[[" else Any)
    error = unreadable(raised.value)
    assert error.details["field"] == field
    assert error.message.startswith(message)


@given(st.dictionaries(st.text(), st.text(), min_size=1))
def test_a_key_that_cannot_be_read_is_named_by_its_mapping_whatever_its_text_is(values: dict[str, str]) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.convert({"name": "a", "by": values}, Part)
    assert unreadable(raised.value, "part").details["field"] == "part.by[...]"
