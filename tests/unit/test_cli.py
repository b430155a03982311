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

import pytest
from click.testing import CliRunner

from taxiway.cli import main
from taxiway.cli.address import find_fleet, key_for
from taxiway.cli.failure import EXIT_CODES, exit_code, hint_for
from taxiway.cli.fleet import find_tree
from taxiway.cli.group import COMMANDS
from taxiway.cli.request_options import json_or_text
from taxiway.cli.show import (
    brief,
    duration,
    report_line,
    show_fleet,
    show_models,
    show_placement,
    show_result,
    show_status,
)
from taxiway.client.asyncio_client import CONNECT_TIMEOUT
from taxiway.contract.job import JobRecord, JobState, JobStatus, Result, RunReport
from taxiway.errors import DeadlineExceededError, OverloadedError, TaxiwayError, UnknownModelError

NOBODY = "http://127.0.0.1:9"
REPORT = RunReport(
    hardware_class="gpu.realtime",
    variant="onnx-int8",
    device="cpu:0",
    emulated=True,
    batch=3,
    queue_wait=0.002,
    run_time=1.5,
    cost=1.25e-6,
    reason="cheapest",
)


@pytest.fixture
def cli(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("TAXIWAY_URL", "TAXIWAY_DATA"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, **settings):
        return CliRunner().invoke(main, arguments, **settings)

    return run


def command_line(*arguments, **settings):
    command = [sys.executable, "-m", "taxiway", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **settings)


def test_help_names_every_verb_and_every_exit_code(cli):
    told = cli("--help").stdout

    assert all(re.search(rf"^  {verb} ", told, re.MULTILINE) for verb in COMMANDS)
    assert all(meaning in told for meaning in EXIT_CODES.values())


def processor_seconds():
    """What the processes that this one started and that have ended took: other load on the machine adds little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_costs_less_than_150_milliseconds():
    def seconds():
        before = processor_seconds()
        assert command_line("--help").returncode == 0
        return processor_seconds() - before

    assert min(seconds() for _ in range(5)) < 0.15


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_help_that_begins_as_the_table_says(cli, verb):
    answer = cli(verb, "--help")

    assert answer.exit_code == 0
    assert "--json" in answer.stdout


def test_no_library_of_a_door_is_imported_for_help():
    code = (
        "import sys; from taxiway.cli import main; main(['submit', '--help'], standalone_mode=False);"
        "print([m for m in ('redis', 'aiohttp', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "echo"],
        ["submit", "echo", "--text", "a", "--inputs", "1"],
        ["submit", "echo", "--inputs", "{nope"],
        ["submit", "echo", "--text", "a", "-p", "nope"],
        ["submit", "echo", "--text", "a", "--priority", "urgent"],
        ["submit", "echo", "--file", "nothing.jpg"],
        ["explain"],
        ["explain", "x", "--what-if", "echo", "--text", "a"],
        ["explain", "x", "--text", "a"],
        ["explain", "--what-if", "echo"],
        ["completion", "tcsh"],
        ["fly"],
    ],
)
def test_wrong_usage_exits_with_2(cli, arguments):
    assert cli(*arguments).exit_code == 2


def test_a_term_that_means_nothing_exits_with_2_and_names_its_field(cli):
    answer = cli("submit", "echo", "--text", "a", "--deadline", "nan", "--url", NOBODY)

    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: deadline: expected a finite number > 0")


@pytest.mark.parametrize(
    "arguments", [["submit", "echo", "--text", "a"], ["status"], ["models"], ["result", "x"], ["explain", "x"]]
)
def test_a_fleet_that_is_not_there_exits_with_4_and_a_hint(cli, arguments):
    answer = cli(*arguments)

    assert answer.exit_code == 4
    assert answer.stdout == ""
    assert re.match(r"error: no fleet runs from .taxiway\nhint: `taxiway up", answer.stderr)


@pytest.mark.parametrize("url", [NOBODY, "redis://127.0.0.1:9"])
def test_a_fleet_that_does_not_answer_exits_with_4_and_is_waited_for_no_longer_than_two_seconds(url):
    before, began = processor_seconds(), time.monotonic()
    done = command_line("submit", "echo", "--text", "a", "--url", url)

    assert CONNECT_TIMEOUT + processor_seconds() - before < 2
    assert time.monotonic() - began < 10 * CONNECT_TIMEOUT  # it was tried once; on a busy machine its start takes long
    assert done.returncode == 4
    assert "does not answer" in done.stderr
    assert "hint: " in done.stderr


def test_the_fleet_is_the_one_given_else_the_environments_else_the_one_that_runs_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".taxiway", "elsewhere", "named"):
        Path(folder).mkdir()
        Path(folder, "fleet.json").write_text(json.dumps({"http": f"http://{folder}", "pid": 1}))
    named = {"TAXIWAY_DATA": "named"}
    environment = {**named, "TAXIWAY_URL": "http://environment"}

    assert find_fleet(None, None, {}) == "http://.taxiway"
    assert find_fleet(None, None, named) == "http://named"
    assert find_fleet(None, Path("elsewhere"), named) == "http://elsewhere"
    assert find_fleet(None, Path("elsewhere"), environment) == "http://environment"
    assert find_fleet("http://option", None, environment) == "http://option"


def test_an_interrupt_exits_with_130():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "taxiway", "result", "x", "--wait", "30", "--url", url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, silent.accept()[0]:
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=10)[1]

    assert process.returncode == 130
    assert said == "error: interrupted\n"


@pytest.mark.parametrize("verb", ["up", "down", "doctor"])
def test_the_fleets_verbs_say_what_is_missing_where_only_the_client_is_installed(tmp_path, verb):
    package = Path(__file__).parents[2] / "taxiway"
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


def test_a_checkout_is_known_by_its_files(tmp_path):
    tree = Path(__file__).parents[2]

    assert find_tree([tmp_path, tree]) == tree


def test_the_fleets_verbs_run_from_any_folder_even_one_that_has_a_tasks_package(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('the wrong tasks')")
    tree = str(Path(__file__).parents[2])

    done = command_line("down", "--json", cwd=tmp_path, env={**os.environ, "PYTHONPATH": tree})

    assert json.loads(done.stdout)["stopped"] is False
    assert done.returncode == 0


def test_what_is_missing_in_a_command_is_said_by_the_fleets_own_command_line(tmp_path):
    done = command_line("up", "--workers", "nonsense", "--data", str(tmp_path))

    assert done.returncode == 2
    assert "CLASS=N" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed(cli, shell):
    assert "_TAXIWAY_COMPLETE" in cli("completion", shell).stdout


def test_the_completion_script_completes_verbs():
    words = {"COMP_WORDS": "taxiway sub", "COMP_CWORD": "1", "_TAXIWAY_COMPLETE": "bash_complete"}
    code = "from taxiway.cli import main; main(prog_name='taxiway')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **words}, timeout=60, check=False)

    assert "submit" in done.stdout


@pytest.mark.parametrize(
    ("raw", "value"),
    [(b'{"a": 1}', {"a": 1}), (b"3.5", 3.5), (b"plain words", "plain words"), (b"\xff\xd8", b"\xff\xd8")],
)
def test_standard_input_is_json_else_text_else_bytes(raw, value):
    assert json_or_text(raw) == value


def test_errors_of_the_fleet_have_an_exit_code_by_whose_fault_they_are():
    assert exit_code(UnknownModelError("")) == 2
    assert exit_code(DeadlineExceededError("")) == 1
    assert exit_code(OverloadedError("")) == 4
    assert exit_code(TaxiwayError("")) == 1
    assert hint_for(OverloadedError("", retry_after=3.0)).endswith("(in 3 s)")


def test_a_report_says_that_its_device_was_emulated():
    assert report_line(REPORT) == (
        "gpu.realtime · onnx-int8 · cpu:0 (emulated) · waited 2 ms · ran 1.50 s in a batch of 3 · $1.25e-06 · cheapest"
    )


def test_long_values_are_cut_and_say_how_long_they_are():
    assert brief([0.5] * 384).endswith("… 384 in all]")
    assert brief(b"12345") == "5 bytes"
    assert brief({"label": "cat", "score": 0.987654321}) == "label cat, score 0.987654"
    assert duration(0.0123) == "12.3 ms"


def test_rows_are_a_table_and_a_vector_is_one_line(capsys):
    show_result(Result(model="m:1", outputs={"label": ["good", "bad"], "score": [0.9, 0.8]}, report=REPORT))
    rows = capsys.readouterr().out.splitlines()
    show_result(Result(model="m:1", outputs={"embedding": [0.5] * 384}, report=REPORT))
    vector = capsys.readouterr().out.splitlines()

    assert [line.split() for line in rows[1:3]] == [["0", "good", "0.9"], ["1", "bad", "0.8"]]
    assert len(vector) == 2


def test_a_status_shows_what_is_known_and_leaves_out_the_rest(capsys):
    record = JobRecord(id="j", state=JobState.QUEUED, model="echo:1", hardware_class="cpu.batch", reason="a [bold] one")
    show_status(JobStatus(record=record, position=3, eta=0.5))
    shown = capsys.readouterr().out

    assert "cpu.batch" in shown
    assert "in 500 ms" in shown
    assert "a [bold] one" in shown
    assert "deadline" not in shown


def test_a_placement_shows_its_reason_and_its_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    seconds = {"transfer": 0.0, "wait": 0.5, "load": 0.0, "run": 0.25, "guaranteed": 1.5}
    figures = {"finish": 0.75, "cost": 1e-6, "warm": True, **seconds}
    chosen = {"hardware_class": "cpu.batch", "variant": "a", "chosen": True, "why_not": None, "warning": "no profile"}
    other = {**chosen, "variant": "b", "chosen": False, "why_not": "more expensive: 2 USD against 1", "warning": None}
    refused = {"hardware_class": "tpu.bulk", "variant": "a", "reason": "no device of the class is live"}
    considered = [{**chosen, **figures}, {**other, **figures}]
    show_placement({"id": "j", "reason": "cheapest", "note": None, "considered": considered, "refused": [refused]})
    shown = capsys.readouterr().out

    for words in (
        "cheapest",
        "wait 500 ms + run 250 ms",
        "$1e-06",
        "more expensive: 2 USD",
        "no device of the class",
        "no profile",
    ):
        assert words in shown
    assert "note" not in shown


def test_models_and_fleet_are_tables(capsys):
    model = {
        "name": "echo",
        "versions": ["1"],
        "aliases": {"stable": "1"},
        "variants": {"echo": {}},
        "summary": "echoes",
    }
    device = {"worker": "w@h", "device": "cpu:0", "emulated": True, "warm": ["echo:1/echo"]}
    classes = {"cpu.batch": {"device": "cpu", "usd_per_hour": 0.05, "devices": 1, "work": [0.5, 0.5]}}
    show_models([model])
    show_fleet({"stale": True, "classes": classes, "devices": [device]})
    shown = capsys.readouterr().out

    assert "stable→1" in shown
    assert "1.00 s" in shown
    assert "cpu:0 (emulated)" in shown
    assert "this is old" in shown


def test_the_key_goes_to_routers_alone():
    environment = {"TAXIWAY_KEY": "taxiway_one"}

    assert key_for("http://router", environment) == key_for("https://router", environment) == "taxiway_one"
    assert key_for("redis://broker", environment) is key_for("http://router", {}) is None


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["status", "--nonsense"], "Usage: taxiway status "),
        (["up", "--port", "many"], "Usage: taxiway up "),
        (["plan", "--nonsense"], "Usage: taxiway plan "),
        (["keys", "new"], "Usage: taxiway keys new "),
    ],
)
def test_a_usage_error_names_the_command_that_was_typed(arguments, usage):
    done = command_line(*arguments)

    assert done.returncode == 2
    assert done.stderr.startswith(usage)
    assert "python -m" not in done.stderr


def test_a_port_that_is_taken_is_one_line_and_a_hint(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        done = command_line("up", "--detach", "--data", str(tmp_path), "--flower-port", str(port))

    assert done.returncode == 3
    error, hint = done.stderr.splitlines()
    assert re.fullmatch(rf"error: --flower-port {port}: the port is taken by \S+ \(process {os.getpid()}\)", error)
    assert hint.startswith("hint: ")


def test_a_fleet_whose_supervisor_was_killed_does_not_run(tmp_path, cli):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (tmp_path / "fleet.json").write_text(json.dumps({"http": NOBODY, "pid": ended.pid}))
    told = cli("status", "--data", str(tmp_path))

    assert told.exit_code == 4
    assert f"no fleet runs from {tmp_path}: its supervisor, process {ended.pid}, has ended" in told.stderr
    assert find_fleet("http://elsewhere", tmp_path, {}) == "http://elsewhere"


def test_a_fleet_is_not_started_on_a_server_that_does_not_answer(tmp_path):
    broker = {"TAXIWAY_BROKER": "redis://:secret-word@127.0.0.1:9/0"}
    done = command_line("up", "--detach", "--data", str(tmp_path), env={**os.environ, **broker})

    assert done.returncode == 4
    assert done.stderr.startswith("error: TAXIWAY_BROKER: redis://127.0.0.1:9: ")
    assert "secret-word" not in done.stderr
    assert not list(tmp_path.iterdir())
