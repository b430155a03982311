"""The scripts as text: what they say that Python says, too, and that each can be sent."""

import re

import pytest

from broker.valkey import FOLDER, script
from taxiway.contract.job import FINAL
from taxiway.contract.keys import jobs_cell, turns_cell

NAMES = sorted(f"{path.parent.name}/{path.stem}" for path in FOLDER.glob("*/*.lua") if path.parent.name != "includes")


@pytest.mark.parametrize("name", NAMES)
def test_a_script_begins_with_what_it_does_what_it_returns_and_whether_it_may_run_twice(name: str) -> None:
    text = script(name)
    assert "@include" not in text
    assert re.match(r"(#!lua flags=allow-oom\n)?-- [A-Z].*\n(-- .*\n)*--\n-- KEYS", text)
    assert re.search(r"^-- Returns \S", text, re.MULTILINE)
    assert re.search(r"^-- (Safe|Not safe) to run twice\b", text, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", ["KEYS", "ARGV"])
def test_a_script_describes_just_the_keys_and_arguments_that_it_uses_on_a_line_each(name: str, table: str) -> None:
    shared = re.search(r"^-- KEYS and ARGV: those of (\w+)\.lua\.$", script(name), re.MULTILINE)
    text = script(f"{name.split('/')[0]}/{shared[1]}" if shared else name)
    fixed, repeated = _described(table, text)
    assert fixed == list(range(1, len(fixed) + 1))
    assert repeated in ([], [len(fixed) + 1])
    code = re.sub(r"^--.*\n", "", text, flags=re.MULTILINE)
    assert {number for number in _used(table, code) if not repeated or number < repeated[0]} == {*fixed}
    computed = rf"#{table}\b(?!\[)|{table}\[(?!\d+\])|ipairs\({table}\)|unpack\({table}, (?!\d+, \d+\))"
    assert bool(re.search(computed, code)) == bool(repeated)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_takes_one_argument_for_each_job_and_searches_no_message(name: str) -> None:
    code = re.sub(r"^--.*\n", "", script(name), flags=re.MULTILINE)
    assert not re.search(r"ARGV\[[^]]*\*|unpack\(ARGV, [^0-9]|string\.find", code)


def _described(table: str, text: str) -> tuple[list[int], list[int]]:
    """The numbers of the keys or arguments in a script's header, and the one that begins the repeated ones."""
    slots = re.findall(rf"^-- {table}\[(\d+)(\.\.)?\] \S", text, re.MULTILINE)
    return [int(number) for number, more in slots if not more], [int(number) for number, more in slots if more]


def _used(table: str, code: str) -> set[int]:
    """The numbers by which a script's code names its keys or arguments."""
    used = {int(number) for number in re.findall(rf"\b{table}\[(\d+)\]", code)}
    for first, last in re.findall(rf"unpack\({table}, (\d+), (\d+)\)", code):
        used.update(range(int(first), int(last) + 1))
    for names in re.findall(rf"local ([\w, ]+) = unpack\({table}\)", code):
        used.update(range(1, names.count(",") + 2))
    return used


@pytest.mark.parametrize("name", NAMES)
def test_a_script_holds_each_include_once_and_names_no_key(name: str) -> None:
    text = script(name)
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
