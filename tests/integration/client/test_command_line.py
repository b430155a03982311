"""The client and its command line as processes of their own: imports, start-up, exit codes, streams and signals."""

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
from tests.command_line import CommandLine, program

NO_SERVER = "http://127.0.0.1:9"


def processor_seconds() -> float:
    """What the processes that this one started and that have ended took: other load on the machine adds little."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def run(code: str) -> str:
    """What a program prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def seconds(code: str) -> float:
    before, _ = processor_seconds(), run(code)
    return processor_seconds() - before


@pytest.mark.parametrize("start", ["import taxiway", "from taxiway.cli import main; main(['--help'])"])
def test_the_client_and_help_cost_less_than_150_milliseconds(start: str) -> None:
    assert min(seconds(start) for _ in range(5)) < 0.15


@pytest.mark.cases("code, libraries, imported")
def test_no_library_is_imported_before_it_is_needed(code: str, libraries: list[str], imported: list[str]) -> None:
    loaded = run(f"import sys; {code}; print(*sys.modules)").split()
    assert [name for name in libraries if name in loaded] == imported


@pytest.mark.parametrize("url, way", [(NO_SERVER, "http"), ("redis://127.0.0.1:9", "valkey")])
def test_a_fleet_that_does_not_answer_exits_with_4_and_is_waited_for_under_two_seconds(url: str, way: str) -> None:
    start = min(seconds(f"import taxiway.cli.jobs, taxiway.client.{way}_transport") for _ in range(2))
    before, began = processor_seconds(), time.monotonic()
    done = program("taxiway", "submit", "echo", "--text", "a", "--url", url)

    assert CONNECT_TIMEOUT + processor_seconds() - before - start < 2
    assert time.monotonic() - began < 10 * CONNECT_TIMEOUT  # it was tried once; on a busy machine its start takes long
    assert done.returncode == 4
    assert "does not answer" in done.stderr and "hint: " in done.stderr


async def test_a_job_whose_fleet_stops_answering_can_be_waited_for_again() -> None:
    with pytest.raises(CommandError) as caught:
        async with AsyncClient(NO_SERVER) as client:
            await answer_of(client.job("a-job"), 1.0, stream=False, as_json=True)
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
    command = [sys.executable, "-m", "taxiway", "simulate", "--trace", str(trace)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, trace.open("w"):
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]

    assert process.returncode == 130
    assert said.strip() == "error: interrupted"


@pytest.mark.parametrize("arguments", [("--help",), ("simulate", "--help"), ("check", "--json")], ids=" ".join)
def test_output_that_nothing_reads_any_more_ends_a_command_quietly(arguments: tuple[str, ...]) -> None:
    unread, output = os.pipe()
    os.close(unread)
    command = [sys.executable, "-m", "taxiway", *arguments]
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(output)

    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_output_that_the_terminals_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    done = program("taxiway", "doctor", TAXIWAY_DATA=str(tmp_path), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2713" in done.stdout


def test_an_argument_that_is_not_utf_8_is_one_line() -> None:
    done = program("taxiway", "dead", "replay", os.fsdecode(b"job-\xfc"), "--url", NO_SERVER)
    assert (done.returncode, done.stderr) == (2, "error: expected arguments in UTF-8, got 'job-\\udcfc'\n")


def test_an_address_that_cannot_be_read_is_one_line() -> None:
    done = program("taxiway", "status", "--url", "http://u:secret@[::1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: url: expected an IPv6 address between [ and ]")
    assert "secret" not in done.stderr


def test_the_fleets_verbs_say_what_is_missing_where_only_the_client_is_installed(tmp_path: Path) -> None:
    shutil.copytree(TREE / "taxiway", tmp_path / "site" / "taxiway")
    (tmp_path / "here").mkdir()
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    code = "import sys; sys.path[:] = [p for p in sys.path if p]; from taxiway.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-P", "-c", code, "up"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "here", env=environment, check=False)

    assert (done.returncode, done.stdout) == (3, "")
    assert "only taxiway's client is installed here" in done.stderr
    assert "make setup" in done.stderr


def test_the_fleets_verbs_run_from_any_folder_even_one_that_has_a_tasks_package(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('the wrong tasks')")

    done = program("taxiway", "down", "--json", folder=tmp_path, PYTHONPATH=str(TREE))

    assert json.loads(done.stdout)["stopped"] is False
    assert done.returncode == 0


@pytest.mark.cases("arguments, variables")
def test_a_folder_that_cannot_be_written_is_named_without_a_traceback(
    tmp_path: Path, arguments: list[str], variables: dict[str, Any]
) -> None:
    (tmp_path / "file").touch()
    places = {"file": str(tmp_path / "file"), "folder": str(tmp_path / "data")}
    variables = {name: value.format(**places) for name, value in variables.items()}
    done = program("taxiway", "up", *(one.format(**places) for one in arguments), **variables)

    assert done.returncode == 3
    assert re.search(rf"^error: {places['file']}\S*: not a directory$", done.stderr, re.MULTILINE)
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.cases("command, begins, said")
def test_wrong_usage_names_the_command_that_was_typed_and_says_what_is_expected(
    command: str, begins: str, said: str
) -> None:
    done = program("taxiway", *command.split(), TAXIWAY_KEYS="")

    assert done.returncode == 2
    assert done.stderr.startswith(begins)
    assert said in done.stderr
    assert not any(text in done.stderr for text in ("python -m", "Traceback"))


def test_a_port_that_is_taken_is_one_line_and_a_hint(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        done = program("taxiway", "up", "--detach", "--data", str(tmp_path), "--flower-port", str(port))

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
    broker = "redis://:secret-word@127.0.0.1:9/0"
    done = program("taxiway", "up", "--detach", "--data", str(tmp_path), TAXIWAY_BROKER=broker)

    assert done.returncode == 4
    assert done.stderr.startswith("error: TAXIWAY_BROKER: redis://127.0.0.1:9: ")
    assert "secret-word" not in done.stderr
    assert not list(tmp_path.iterdir())
