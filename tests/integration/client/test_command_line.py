"""The command line as a process of its own: start-up, exit codes, streams and signals."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.settings import TREE
from taxiway.cli import CommandError
from taxiway.cli.address import find_fleet
from taxiway.cli.jobs import answer_of
from taxiway.client.asyncio_client import CONNECT_TIMEOUT, AsyncClient
from tests.command_line import CommandLine

NO_SERVER = "http://127.0.0.1:9"


def command_line(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "taxiway", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **settings)


def processor_seconds() -> float:
    """What the processes that this one started and that have ended took: other load on the machine adds little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_costs_less_than_150_milliseconds() -> None:
    def seconds() -> float:
        before = processor_seconds()
        assert command_line("--help").returncode == 0
        return processor_seconds() - before

    assert min(seconds() for _ in range(5)) < 0.15


def test_no_library_of_an_interface_is_imported_for_help() -> None:
    code = (
        "import sys; from taxiway.cli import main; main(['submit', '--help'], standalone_mode=False);"
        "print([m for m in ('redis', 'aiohttp', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("url", [NO_SERVER, "redis://127.0.0.1:9"])
def test_a_fleet_that_does_not_answer_exits_with_4_and_is_waited_for_no_longer_than_two_seconds(url: str) -> None:
    before, began = processor_seconds(), time.monotonic()
    done = command_line("submit", "echo", "--text", "a", "--url", url)

    assert CONNECT_TIMEOUT + processor_seconds() - before < 2
    assert time.monotonic() - began < 10 * CONNECT_TIMEOUT  # it was tried once; on a busy machine its start takes long
    assert done.returncode == 4
    assert "does not answer" in done.stderr
    assert "hint: " in done.stderr


def test_a_job_whose_fleet_stops_answering_can_be_waited_for_again() -> None:
    async def wait() -> None:
        async with AsyncClient(NO_SERVER) as client:
            await answer_of(client.job("a-job"), 1.0, stream=False, as_json=True)

    with pytest.raises(CommandError) as caught:
        asyncio.run(wait())
    assert caught.value.hint == "`taxiway result a-job --wait SECONDS` waits for the job, which continues"


def test_an_interrupt_exits_with_130() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "taxiway", "result", "x", "--wait", "30", "--url", url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, silent.accept()[0]:
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]

    assert process.returncode == 130
    assert said == "error: interrupted\n"


def test_an_interrupt_of_a_verb_that_another_package_implements_exits_with_130_too(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    os.mkfifo(trace)
    fleet = TREE / "simulator" / "fleets" / "azure-mixed.yaml"
    command = [sys.executable, "-m", "taxiway", "simulate", "--trace", str(trace), "--fleet", str(fleet)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, trace.open("w"):
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]

    assert process.returncode == 130
    assert said.strip() == "error: interrupted"


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("completion", "bash"), ("simulate", "--help"), ("check",), ("check", "--json")],
    ids=" ".join,
)
def test_output_that_nothing_reads_any_more_ends_a_command_quietly(arguments: tuple[str, ...]) -> None:
    unread, output = os.pipe()
    os.close(unread)
    command = [sys.executable, "-m", "taxiway", *arguments]
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(output)

    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("verb", ["up", "down", "doctor"])
def test_the_fleets_verbs_say_what_is_missing_where_only_the_client_is_installed(tmp_path: Path, verb: str) -> None:
    package = Path(__file__).parents[3] / "taxiway"
    shutil.copytree(package, tmp_path / "site" / "taxiway")
    (tmp_path / "here").mkdir()
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    code = "import sys; sys.path[:] = [p for p in sys.path if p]; from taxiway.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, verb]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )

    assert done.returncode == 3
    assert done.stdout == ""
    assert "only taxiway's client is installed here" in done.stderr
    assert "make setup" in done.stderr


def test_the_fleets_verbs_run_from_any_folder_even_one_that_has_a_tasks_package(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('the wrong tasks')")
    tree = str(Path(__file__).parents[3])

    done = command_line("down", "--json", cwd=tmp_path, env={**os.environ, "PYTHONPATH": tree})

    assert json.loads(done.stdout)["stopped"] is False
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [(["--data", "{file}/data"], {}), (["--data", "{folder}"], {"TAXIWAY_CACHE": "{file}/cache"})],
)
@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_a_folder_that_cannot_be_written_is_named_without_a_traceback(
    tmp_path: Path, arguments: list[str], settings: dict[str, str], detach: list[str]
) -> None:
    (tmp_path / "file").touch()
    places = {"file": str(tmp_path / "file"), "folder": str(tmp_path / "data")}
    settings = {name: value.format(**places) for name, value in settings.items()}
    fetch = [] if settings else ["--no-fetch"]

    done = command_line("up", *fetch, *detach, *(one.format(**places) for one in arguments), env=os.environ | settings)

    assert done.returncode == 3
    assert re.search(rf"^error: {places['file']}\S*: not a directory$", done.stderr, re.MULTILINE)
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_setting_that_only_the_supervisor_reads_exits_with_2_too(tmp_path: Path) -> None:
    done = command_line(
        "up", "--detach", "--no-fetch", "--data", str(tmp_path), env=os.environ | {"TAXIWAY_SECRET": "short"}
    )

    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1


def test_a_missing_argument_is_reported_by_the_fleets_own_command_line(tmp_path: Path) -> None:
    done = command_line("up", "--workers", "nonsense", "--data", str(tmp_path))

    assert done.returncode == 2
    assert "CLASS=N" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed(cli: CommandLine, shell: str) -> None:
    assert "_TAXIWAY_COMPLETE" in cli("completion", shell).stdout


def test_the_completion_script_completes_verbs() -> None:
    words = {"COMP_WORDS": "taxiway sub", "COMP_CWORD": "1", "_TAXIWAY_COMPLETE": "bash_complete"}
    code = "from taxiway.cli import main; main(prog_name='taxiway')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **words}, timeout=60, check=False)

    assert "submit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["status", "--nonsense"], "Usage: taxiway status "),
        (["up", "--port", "many"], "Usage: taxiway up "),
        (["plan", "--nonsense"], "Usage: taxiway plan "),
        (["keys", "new"], "Usage: taxiway keys new "),
        (["history", "--day", "yesterday"], "Usage: taxiway history "),
    ],
)
def test_a_usage_error_names_the_command_that_was_typed(arguments: list[str], usage: str) -> None:
    done = command_line(*arguments)

    assert done.returncode == 2
    assert done.stderr.startswith(usage)
    assert "python -m" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["keys", "list"], "TAXIWAY_KEYS"),
        (["keys", "list", "--file", "/nowhere"], "/nowhere: expected a readable file of keys, got no such file"),
        (["keys", "new", "--tenant", "lab", "--file", "/proc/nowhere/keys"], "error: /proc/nowhere"),
        (["history", "--day", "yesterday"], "expected a UTC day, such as 2026-11-27, got 'yesterday'"),
        (["history", "export"], "Missing argument 'DAY'"),
        (
            ["profile", "--model", "echo", "--output", "/proc/nowhere"],
            "--output: /proc/nowhere: no such file or directory",
        ),
    ],
)
def test_wrong_usage_of_the_fleets_verbs_says_what_is_expected(arguments: list[str], said: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TAXIWAY_KEYS"}
    done = command_line(*arguments, env=environment)

    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_one_line_and_a_hint(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        done = command_line("up", "--detach", "--data", str(tmp_path), "--flower-port", str(port))

    assert done.returncode == 3
    error, hint = done.stderr.splitlines()
    assert re.fullmatch(rf"error: --flower-port {port}: the port is taken by \S+ \(process {os.getpid()}\)", error)
    assert hint.startswith("hint: ")


def test_a_fleet_whose_supervisor_was_killed_does_not_run(tmp_path: Path, cli: CommandLine) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (tmp_path / "fleet.json").write_text(json.dumps({"http": NO_SERVER, "pid": ended.pid}))
    shown = cli("status", "--data", str(tmp_path))

    assert shown.exit_code == 4
    assert f"no fleet runs from {tmp_path}: its supervisor, process {ended.pid}, has ended" in shown.stderr
    assert find_fleet("http://elsewhere", tmp_path, {}) == "http://elsewhere"


def test_a_fleet_is_not_started_on_a_server_that_does_not_answer(tmp_path: Path) -> None:
    broker = {"TAXIWAY_BROKER": "redis://:secret-word@127.0.0.1:9/0"}
    done = command_line("up", "--detach", "--data", str(tmp_path), env={**os.environ, **broker})

    assert done.returncode == 4
    assert done.stderr.startswith("error: TAXIWAY_BROKER: redis://127.0.0.1:9: ")
    assert "secret-word" not in done.stderr
    assert not list(tmp_path.iterdir())
