"""A process that is forked to save its imports is like one that was started."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.forked import IMPORTS, Forked, Process, start

FRESH = {"PYTHONHASHSEED": "0"}  # read before any program's first line: such a process cannot be a fork


def begin(kind: str, log: Any, words: list[str], more: Mapping[str, str] | None = None) -> Process:
    return start(kind, "tests.appearance", words, {**os.environ, "TAXIWAY_CLASS": "this", **(more or {})}, log)


def read(process: Process) -> tuple[dict[str, Any], float, list[str]]:
    assert process.stdout is not None
    with process.stdout as output:
        seen, number, modules = json.loads(output.read())
    return seen, number, modules


@pytest.mark.parametrize("kind", IMPORTS)
def test_a_forked_process_is_as_a_new_one(kind: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        forked, twin, fresh = (begin(kind, log, ["7", "two words"], more) for more in ({}, {}, FRESH))
    assert (type(forked), type(fresh)) == (Forked, subprocess.Popen)
    (seen, number, modules), (_, other, _), (expected, _, _) = map(read, (forked, twin, fresh))
    for name in FRESH:
        del expected["environment"][name]
    assert seen == expected
    assert number != other
    assert not {"torch", "jax", "onnxruntime"} & set(modules)
    assert [one.wait(20) for one in (forked, twin, fresh)] == [7, 7, 7]
    assert (tmp_path / "log").read_text() == "the end\n" * 3
