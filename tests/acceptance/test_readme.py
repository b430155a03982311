"""The README's quick start, run as it is printed; only the addresses are those of the fleet under test."""

import re
import shlex
import subprocess
import sys

import pytest

from tasks.settings import TREE
from tests.acceptance.running import taxiway

README = (TREE / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands(word):
    """The README's console lines that start with `word`, continued lines joined."""
    joined = "\n".join(blocks("console")).replace("\\\n", " ")
    return re.findall(rf"^\$ ({word} (?:[^'\n]|'[^']*')*)", joined, re.MULTILINE)


@pytest.mark.parametrize("code", blocks("python"))
def test_the_readmes_python_prints_an_answer(fleet, code):
    here = f"BROKER = {fleet.broker!r}\n" + code.replace("http://127.0.0.1:8080", fleet.http)

    done = subprocess.run([sys.executable, "-c", here], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert re.match(r"(positive|negative)", done.stdout)


@pytest.mark.parametrize("command", commands("curl"))
def test_the_readmes_curl_gets_an_answer(fleet, command):
    here = shlex.split(command.replace("http://127.0.0.1:8080", fleet.http))

    done = subprocess.run(here, capture_output=True, text=True, timeout=60, check=True)

    assert '"positive"' in done.stdout


@pytest.mark.parametrize("command", [c for c in commands("taxiway") if c.split()[1] in {"submit", "status", "models"}])
def test_the_readmes_taxiway_commands_work(fleet, command):
    said = taxiway(*shlex.split(command, comments=True)[1:], settings={"TAXIWAY_DATA": fleet.data})

    assert said.strip()


def test_the_make_targets_that_the_readme_names_exist():
    makefile = (TREE / "Makefile").read_text(encoding="utf-8")

    for target in re.findall(r"^\$ make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
