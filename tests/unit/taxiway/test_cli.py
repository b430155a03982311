"""The command line: what it asks, what it shows, and `taxiway top`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from rich.console import Console

from taxiway.cli import COMMANDS, EXIT_CODES, hint_for, show
from taxiway.cli.address import find_fleet, key_for
from taxiway.cli.fleet import find_tree
from taxiway.cli.jobs import json_or_text
from taxiway.contract.job import JobRecord, JobState, Result, Tokens, status_of
from taxiway.errors import TaxiwayError
from tests.builders import a_report, recorded
from tests.command_line import CommandLine

NO_SERVER = "http://127.0.0.1:9"
RAN = {"batch": 3, "queue_wait": 0.002, "run_time": 1.5, "cost": 1.25e-6}
REPORT = a_report(hardware_class="gpu.realtime", emulated=True, reason="cheapest", **RAN)


def test_help_names_every_verb_and_every_exit_code(cli: CommandLine) -> None:
    shown = cli("--help").stdout
    assert all(re.search(rf"^  {verb} ", shown, re.MULTILINE) for verb in COMMANDS)
    assert all(meaning in shown for meaning in EXIT_CODES.values())


@pytest.mark.parametrize("verb", [verb for verb, (module, _) in COMMANDS.items() if module.startswith("taxiway.")])
def test_every_verb_has_help_that_begins_as_the_table_says(cli: CommandLine, verb: str) -> None:
    answer = cli(verb, "--help")
    assert answer.exit_code == 0
    assert "--json" in answer.stdout


@pytest.mark.parametrize(("typed", "option"), [("up", "--detach"), ("check", "--show"), ("keys new", "--scope")])
def test_a_shell_completes_the_options_of_the_fleets_verbs(cli: CommandLine, typed: str, option: str) -> None:
    asked = {"_TAXIWAY_COMPLETE": "bash_complete", "COMP_WORDS": f"taxiway {typed} {option[:4]}"}
    answer = cli(env={**asked, "COMP_CWORD": str(len(typed.split()) + 1)}, prog_name="taxiway")
    assert f"plain,{option}" in answer.stdout.splitlines()


@pytest.mark.cases("arguments")
def test_wrong_usage_exits_with_2(cli: CommandLine, arguments: list[str]) -> None:
    assert cli(*arguments).exit_code == 2


def test_a_term_that_means_nothing_exits_with_2_and_names_its_field(cli: CommandLine) -> None:
    answer = cli("submit", "echo", "--text", "a", "--deadline", "nan", "--url", NO_SERVER)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: deadline: expected a number of seconds > 0")


@pytest.mark.parametrize(
    "arguments", [["submit", "echo", "--text", "a"], ["status"], ["models"], ["result", "x"], ["explain", "x"]]
)
def test_a_fleet_that_is_not_there_exits_with_4_and_a_hint(cli: CommandLine, arguments: list[str]) -> None:
    answer = cli(*arguments)
    assert answer.exit_code == 4
    assert answer.stdout == ""
    assert re.match(r"error: no fleet runs from .taxiway\nhint: start a fleet with `taxiway up", answer.stderr)


def test_the_fleet_is_given_else_the_environments_else_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_checkout_is_known_by_its_files(tmp_path: Path) -> None:
    tree = Path(__file__).parents[3]
    assert find_tree([tmp_path, tree]) == tree


@pytest.mark.cases("raw, value")
def test_standard_input_is_json_else_text_else_bytes(raw: bytes, value: object) -> None:
    assert json_or_text(raw) == value


@pytest.mark.cases("kind, details, code, hint")
def test_errors_have_an_exit_code_by_whose_fault_they_are_and_a_hint(
    kind: type[TaxiwayError], details: dict[str, Any], code: int, hint: str
) -> None:
    error = kind("", **details)
    assert error.exit_code == code
    assert hint in hint_for(error)
    assert hint == "maxmemory" or "maxmemory" not in hint_for(error)


def test_a_report_has_its_emulated_device_and_the_tokens_that_an_endpoint_counted() -> None:
    assert show.report_line(REPORT) == (
        "gpu.realtime · onnx-int8 · cpu:0 (emulated) · waited 2 ms · ran 1.50 s in a batch of 3 · $1.25e-06 · cheapest"
    )
    counted = msgspec.structs.replace(REPORT, tokens=Tokens(12, 4, 3), cost=0.25)
    assert "12 tokens in (4 cached), 3 out · $0.25" in show.report_line(counted)


def test_long_values_are_cut_and_say_how_long_they_are() -> None:
    assert show.brief([0.5] * 384).endswith("… 384 in all]")
    assert [show.brief(b"12345"), show.brief({"label": "cat", "score": 0.987654321})] == [
        "5 bytes",
        "label cat, score 0.987654",
    ]
    assert [show.duration(0.0123), show.duration(1.6e-16)] == ["12.3 ms", "0 ms"]


def test_rows_are_a_table_and_a_vector_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show.show_result(Result(model="m:1", outputs={"label": ["good", "bad"], "score": [0.9, 0.8]}, report=REPORT))
    rows = capsys.readouterr().out.splitlines()
    show.show_result(Result(model="m:1", outputs={"embedding": [0.5] * 384}, report=REPORT))
    vector = capsys.readouterr().out.splitlines()
    assert [line.split() for line in rows[1:3]] == [["0", "good", "0.9"], ["1", "bad", "0.8"]]
    assert len(vector) == 2


def test_a_status_shows_what_is_known_and_leaves_out_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    record = JobRecord(id="j", state=JobState.QUEUED, model="echo:1", hardware_class="cpu.batch", reason="a [bold] one")
    show.show_status(status_of(record, position=3, eta=0.5))
    shown = capsys.readouterr().out
    assert [words in shown for words in ("cpu.batch", "in 500 ms", "a [bold] one", "deadline")] == [True] * 3 + [False]


def test_a_placement_shows_its_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    seconds = {"transfer": 0.0, "wait": 0.5, "load": 0.0, "run": 0.25, "at_most": 1.5}
    figures = {"finish": 0.75, "cost": 1e-6, "warm": True, **seconds}
    chosen = {"hardware_class": "cpu.batch", "variant": "a", "chosen": True, "why_not": None, "warning": "no profile"}
    other = {**chosen, "variant": "b", "chosen": False, "why_not": "more expensive: 2 USD against 1", "warning": None}
    refused = {"hardware_class": "tpu.bulk", "variant": "a", "reason": "no device of the class is live"}
    unlike = {**other, "variant": "c", "warning": "no profile"}
    considered = [{**chosen, **figures}, {**other, **figures}, {**unlike, **figures}]
    show.show_placement({"id": "j", "reason": "cheapest", "note": None, "considered": considered, "refused": [refused]})
    shown = capsys.readouterr().out

    for words in (
        "cheapest",
        "wait 500 ms + run 250 ms",
        "$1e-06",
        "more expensive: 2 USD",
        "no device of the class",
        "warning: cpu.batch/a, cpu.batch/c: no profile\nhint: `taxiway profile",
    ):
        assert words in shown
    assert "note" not in shown


def test_models_and_fleet_are_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    model = {"name": "echo", "versions": ["1"], "aliases": {"stable": "1"}, "variants": {"echo": {}}, "summary": "…"}
    device = {"worker": "w@h", "device": "cpu:0", "emulated": True, "warm": ["echo:1/echo"], "serves": []}
    price = {"usd_per_million_input": 2.5, "usd_per_million_output": 10.0, "usd_per_request": 0.0}
    classes = {"cpu.batch": a_class(work=[0.5, 0.5], spending=0.3), "hosted": a_class(price=price)}
    show.show_models([model])
    show.show_fleet(a_fleet() | {"classes": classes, "devices": [device]})
    shown = capsys.readouterr().out
    words = ("stable→1", "1.0 s", "  0.3 ", "w@h (serves no class)", "cpu:0 (emulated)", "2.5/M in, 10/M out")
    assert [one for one in words if one not in shown] == []
    assert shown.index("all is well") < shown.index("cpu.batch")


def test_a_fleet_begins_with_what_needs_attention(capsys: pytest.CaptureFixture[str]) -> None:
    disk = {"subject": "state store", "text": "cannot write to its disk", "remedy": "free space there"}
    show.show_fleet(a_fleet() | {"problems": [disk, {**disk, "subject": "class gpu"}]})
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "2 things need attention: state store, class gpu",
        "  ! state store: cannot write to its disk → free space there",
    ]
    show.show_letters([])
    assert capsys.readouterr().out.startswith("no dead letters")


def test_the_id_of_a_job_is_never_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    job = "f972b19f-7dee-4d2f-85e6-c418f3b09592"
    letter = {"id": "39c19e7f7e6f", "at": 1e9, "job": job, "history": [], "reason": "a long reason " * 9}
    show.show_letters([letter])
    listed = JobRecord(id=job, state=JobState.SUCCEEDED, model="classify-image:1", hardware_class="gpu.realtime")
    show.show_jobs([listed, msgspec.structs.replace(listed, tenant="lab")])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert shown.count(job) == 3
    assert max(map(len, shown.splitlines())) <= 80


def test_the_key_goes_to_routers_alone() -> None:
    environment = {"TAXIWAY_KEY": "taxiway_one"}
    assert key_for("http://router", environment) == key_for("https://router", environment) == "taxiway_one"
    assert key_for("redis://broker", environment) is key_for("http://router", {}) is None


SITE = {"worker": "cloud.endpoint-0@edge", "hardware_class": "cloud", "device": "endpoint:0", "emulated": False}


@pytest.mark.cases("endpoint, facts, words")
def test_a_site_is_listed_with_its_distance_and_its_offers_or_why_it_is_silent(
    capsys: pytest.CaptureFixture[str], endpoint: dict[str, Any], facts: dict[str, Any], words: list[str]
) -> None:
    show.show_fleet(a_fleet() | {"devices": [{**SITE, "endpoint": endpoint, **facts}]})
    shown = " ".join(capsys.readouterr().out.split())
    assert [one for one in words if one not in shown] == []
    assert ("sites" in shown) == bool(words)


SHOWN: dict[str, Any] = yaml.safe_load(recorded("documents/top.yaml"))


def a_class(**facts: Any) -> dict[str, Any]:
    return SHOWN["class"] | facts


def a_fleet(devices: int = 12) -> dict[str, Any]:
    named = [{"worker": f"gpu.cuda-{number}@rack", "device": f"cuda:{number}"} for number in range(devices)]
    classes = {"gpu.realtime": a_class(), "cpu.batch": a_class(devices=0, replicas=0)}
    seen = {"now": 100.0, "classes": classes, "devices": [SHOWN["device"] | one for one in named]}
    return SHOWN["fleet"] | seen | {"moves": [SHOWN["move"] | {"at": -100.0}]}


def a_plan(**facts: Any) -> dict[str, Any]:
    return SHOWN["plan"] | facts


def drawn(fleet: Mapping[str, Any], trouble: str = "") -> list[str]:
    console = Console(width=80, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(show.fleet_view(fleet, trouble))
    return capture.get().splitlines()


def test_a_busy_fleet_fits_into_80_columns_with_nothing_cut_off() -> None:
    lines = drawn(a_fleet())
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert "12 devices  800642 waiting  7 held  2 dead letters" in lines[0]
    assert any(line.split()[-2:] == ["12→15", "8.52"] for line in lines)
    assert sum("cuda:" in line for line in lines) == 12
    assert any(line.split() == ["3", "min", "1200", "gpu.realtime", "cpu.batch", "balance"] for line in lines)
    assert drawn(a_fleet(), trouble="no answer")[1] == "stale: no answer"


def test_the_plan_shows_first_classes_its_followers_and_the_tuner() -> None:
    lines = drawn(a_fleet() | {"plan": a_plan()})
    assert max(map(len, lines)) <= 80
    first = next(number for number, line in enumerate(lines) if line.startswith("plan 7"))
    assert lines[first].rstrip() == "plan 7, 45.0 s old, followed by 1 of 2 routers"
    assert lines[first].rstrip() in drawn(a_fleet() | {"plan": a_plan(cells=SHOWN["plan"]["cells"][:1])})
    assert [line.split() for line in lines[first + 1 : first + 4]] == [
        ["model", "live", "bulk"],
        ["sentiment:1", "cpu.batch", "any", "→", "gpu.realtime"],
        ["image:1", "lab", "cpu.batch", "→", "tpu.bulk"],
    ]
    assert lines[first + 4].startswith("tuner vm-12, 45.0 s ago: adopted, 16% better than the plan in use")
    stale = drawn(a_fleet() | {"plan": a_plan(not_followed="plan 7 is stale (older than 600 s)", tuner="", tuned=None)})
    assert "plan 7 is stale (older than 600 s); no tuner at work" in " ".join(" ".join(stale).split())


def test_without_a_plan_there_is_still_a_line_on_the_tuner() -> None:
    lines = drawn(a_fleet() | {"plan": a_plan(number=None, cells=[], adopted=False, found="too few arrivals")})
    at = lines.index("no plan: each request is placed by itself")
    assert lines[at + 1].startswith("tuner vm-12, 45.0 s ago: unchanged, too few arrivals")
    assert not any(line.startswith(("plan", "tuner", "no plan")) for line in drawn(a_fleet()))
