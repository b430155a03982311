"""The scripts as text: what they say that Python says, too, and that each can be sent."""

from __future__ import annotations

import re

import pytest

from broker.valkey import FOLDER, script
from taxiway.contract.job import FINAL
from taxiway.contract.keys import jobs_cell, turns_cell

NAMES = sorted(f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/*.lua") if path.parent.name != "includes")


@pytest.mark.parametrize("name", NAMES)
def test_a_script_has_its_includes_and_a_header_that_says_what_it_takes_and_why_it_may_run_twice(name: str) -> None:
    text = script(name).text
    assert "@include" not in text
    assert text.startswith(("#!lua flags=allow-oom\n--", "--"))
    assert "twice" in text or "changes nothing" in text
    assert "KEYS:" in text or "KEYS, ARGV and answer:" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_script_holds_each_include_once_and_names_no_key(name: str) -> None:
    text = script(name).text
    functions = re.findall(r"^local function (\w+)", text, re.MULTILINE)
    assert len(functions) == len(set(functions))
    assert "taxiway:" not in text
    assert "celery-task-meta" not in text


def test_the_states_in_which_a_job_has_ended_are_those_of_the_contract() -> None:
    text = (FOLDER / "includes" / "final.lua").read_text()
    assert set(re.findall(r"(\w+) = true", text)) == FINAL


def test_the_cells_beside_device_seconds_are_those_of_the_contract() -> None:
    text = (FOLDER / "includes" / "cells.lua").read_text()
    assert set(re.findall(r"'(\|\w+)'", text)) == {jobs_cell(""), turns_cell("")}


def test_every_include_is_used() -> None:
    used = {name for path in FOLDER.rglob("*.lua") for name in re.findall(r'@include "(\w+)"', path.read_text())}
    assert used == {path.stem for path in (FOLDER / "includes").glob("*.lua")}
