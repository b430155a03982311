"""The README's Python and the console blocks of README.md and docs/*.md, run as they are printed.

A page's console blocks run in one shell, at the root of the checkout. Addresses and folders are those of the fleet
under test, which stands for the one that `taxiway up` starts: `up` and `down` do nothing here (`test_local_fleet.py`
runs both). A block that cannot run has the comment `<!-- not run: reason -->` right above it.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from local.fleet import LocalFleet
from tasks.settings import TREE

PAGES = {
    page.relative_to(TREE).as_posix(): page.read_text(encoding="utf-8")
    for page in [TREE / "README.md", *sorted((TREE / "docs").glob("*.md"))]
}
FENCE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- not run: \S[^\n]* -->\n\Z")
COMMAND = re.compile(r"^\$ ((?:[^\n']|'[^']*')*)$", re.MULTILINE)  # a quoted text may have several lines

WITHIN_THE_FLEET = """set -e
taxiway() { case "$1" in up | down) ;; *) command taxiway "$@" ;; esac; }
"""


@dataclass(frozen=True)
class Block:
    """A console block: its page, its commands, and whether it is marked as not run."""

    page: str
    commands: tuple[str, ...]
    marked: bool


BLOCKS = [
    Block(page, tuple(COMMAND.findall(fence[1])), MARK.search(text, 0, fence.start()) is not None)
    for page, text in PAGES.items()
    for fence in FENCE.finditer(text)
]
RUN = [block for block in BLOCKS if not block.marked]


def shell(command: str, fleet: LocalFleet, folder: Path) -> str:
    """What a printed command writes to stdout, run before the fleet; its files in /etc/taxiway are in `folder`."""
    for printed, here in {
        "http://127.0.0.1:8080": fleet.http,
        ".taxiway/": f"{fleet.data}/",
        "/etc/taxiway": str(folder),
        ". .venv/bin/activate": ":",
    }.items():
        command = command.replace(printed, here)
    cache = {"TAXIWAY_CACHE": os.environ["TAXIWAY_CACHE"]} if "TAXIWAY_CACHE" in os.environ else {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TAXIWAY_")} | cache
    environment |= {"TAXIWAY_DATA": fleet.data, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["bash", "-c", WITHIN_THE_FLEET + command]
    done = subprocess.run(script, cwd=TREE, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_console_block_is_run_or_has_a_reason_above_it() -> None:
    assert len(BLOCKS) == sum(text.count("```console") for text in PAGES.values())
    assert len(BLOCKS) - len(RUN) == sum(
        len(re.findall(r"^<!-- not run:[^\n]*\n```console", text, re.MULTILINE)) for text in PAGES.values()
    )
    assert [block.page for block in RUN if not block.commands] == []


@pytest.mark.parametrize("page", sorted({block.page for block in RUN}))
def test_the_commands_of_a_page_work_as_printed(page: str, fleet: LocalFleet, tmp_path: Path) -> None:
    shell("\n".join(command for block in RUN if block.page == page for command in block.commands), fleet, tmp_path)


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", PAGES["README.md"], re.DOTALL | re.MULTILINE))
def test_the_readmes_python_prints_an_answer(fleet: LocalFleet, code: str, tmp_path: Path) -> None:
    script = f"BROKER = {fleet.broker!r}\n{code}"

    said = shell(f"python -c {shlex.quote(script)}", fleet, tmp_path)

    assert re.match(r"(positive|negative|2 embeddings from)", said)


def test_the_readmes_curl_gets_an_answer(fleet: LocalFleet, tmp_path: Path) -> None:
    readme = [command for block in RUN if block.page == "README.md" for command in block.commands]
    (command,) = [one for one in readme if one.startswith("curl ")]

    assert '"positive"' in shell(command, fleet, tmp_path)


def test_the_make_targets_that_the_readme_names_exist() -> None:
    makefile = (TREE / "Makefile").read_text(encoding="utf-8")

    for target in re.findall(r"^\$ make (\w+)", PAGES["README.md"], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
