"""Tables of tests as data: each row of a table in tests/recorded/cases/ is a test's arguments."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import taxiway.errors

CASES = Path(__file__).parent / "recorded" / "cases"


def parametrize(metafunc: pytest.Metafunc) -> None:
    """A test for each row of its table, where it is marked `cases(names)`, and for each that is given there.

    The table has the test's sentence as its name, in the file of its module in tests/recorded/cases/. There `$NAME` is
    what the module or taxiway.errors calls so, and `!bytes` stands before a text of bytes.
    """
    marked = metafunc.definition.get_closest_marker("cases")
    if marked is None:
        return
    *folders, module = metafunc.module.__name__.removeprefix("tests.").removeprefix("unit.").split(".")
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
