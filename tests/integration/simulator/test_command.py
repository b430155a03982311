"""The verbs of the simulator, as a person runs them."""

import json
from pathlib import Path

import msgspec
import pytest

from simulator.__main__ import main
from simulator.policies.taxiway import POLICIES
from tests.builders import a_device
from tests.command_line import CommandLine

TREE = Path(__file__).parents[3]
simulator = CommandLine(main)

KEYS = ["policy", "requests", "attainment", "cost_usd", "score", "p50", "p99", "goodput", "moves", "utilisation"]
MORE = ["live_by_model", "p99_by_service", "starts_usd", "idle_usd", "refused", "usd_by_class"]


SENTIMENT = ("--trace", "poisson:rate=4,duration=30,size=10", "--model", "sentiment")


def test_a_comparison_prints_one_object_a_policy() -> None:
    shown = simulator("simulate", *SENTIMENT, "--compare", "--json")
    assert shown.exit_code == 0
    objects = [json.loads(line) for line in shown.stdout.splitlines()]
    assert all(list(found) == KEYS + MORE for found in objects)
    assert all(list(found["attainment"]) == ["live", "standard", "bulk"] for found in objects)
    assert {*POLICIES} == {found["policy"] for found in objects}


def test_the_fleet_of_a_queues_yaml_is_simulated_by_its_models_profiles_and_what_it_learned(tmp_path: Path) -> None:
    given = (*SENTIMENT, "--json")
    no_fleet = simulator("simulate", *given)
    assert no_fleet.exit_code == 0
    assert "note: no fleet runs here" in no_fleet.stderr
    assert "live stands for live, urgent" in no_fleet.stderr

    learned_paces = {f"sentiment:1/onnx-{precision}": 50.0 for precision in ("fp32", "int8")}
    device = msgspec.to_builtins(
        a_device("cpu.batch", runtimes=("onnx",), instruction_sets=("avx2",), pace=learned_paces)
    )
    (tmp_path / "status.json").write_bytes(msgspec.json.encode({"classes": {"cpu.batch": {}}, "devices": [device]}))
    learned = simulator("simulate", *given, "--status", str(tmp_path / "status.json"))
    assert (learned.exit_code, "no fleet" in learned.stderr) == (0, False)
    fast, slow = (json.loads(done.stdout) for done in (no_fleet, learned))
    assert slow["attainment"]["standard"] == 1.0
    assert slow["p50"] > 5 * fast["p50"]
    assert [name for name, dollars in slow["usd_by_class"].items() if dollars] == ["cpu.batch"]


@pytest.mark.cases("trace, queues, words")
def test_wrong_usage_is_an_error_with_a_hint_and_exit_code_2(trace: str, queues: str, words: str) -> None:
    shown = simulator("simulate", "--trace", trace, "--model", "echo", "--queues", str(TREE / queues))
    assert shown.exit_code == 2
    assert words in shown.stderr
    assert "hint: " in shown.stderr
    assert (shown.stdout, "Traceback" in shown.stderr) == ("", False)


HISTORY = """arrival,model,size,deadline,priority,tenant,output,service,locality
0.000000,sentiment,10,0.25,high,,0,live,
0.500000,sentiment,10,30,normal,,0,standard,
2.000000,echo,1,5,normal,,0,standard,
9.000000,sentiment,10,3600,low,,0,bulk,
"""


@pytest.fixture
def changed(tmp_path: Path) -> list[str]:
    """An exported history, the shipped queues.yaml with cores that cost twice as much, and a device of theirs."""
    (tmp_path / "day.csv").write_text(HISTORY)
    text = (TREE / "queues.yaml").read_text(encoding="utf-8")
    (tmp_path / "queues.yaml").write_text(text.replace("usd_per_hour: 0.05", "usd_per_hour: 0.10"))
    device = msgspec.to_builtins(a_device("cpu.batch", runtimes=("onnx", "echo"), instruction_sets=("avx2",)))
    status = tmp_path / "status.json"
    status.write_bytes(msgspec.json.encode({"classes": {"cpu.batch": {}}, "devices": [device]}))
    return [str(tmp_path / "queues.yaml"), "--history", str(tmp_path / "day.csv"), "--status", str(status)]


def test_a_queues_yaml_is_compared_with_another_on_a_history(changed: list[str]) -> None:
    stated = simulator("diff-config", *changed, "--json")
    assert (stated.exit_code, stated.stderr) == (0, "")
    found = json.loads(stated.stdout)
    assert found["old"]["requests"] == found["new"]["requests"] == 4
    assert found["difference"]["cost_usd"] == pytest.approx(found["old"]["usd_by_class"]["cpu.batch"])
    shares = {(one["model"], one["service"]): (one["old"], one["new"]) for one in found["attained"]}
    named = [("sentiment", name) for name in ("live", "standard", "bulk")]
    assert shares == dict.fromkeys([*named, ("echo", "standard")], (1.0, 1.0))

    shown = simulator("diff-config", *changed)
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in ("cost of cpu.batch", "in time: old", "sentiment live"))


def refused(*arguments: str, code: int = 2) -> str:
    """What a command line says on stderr that is refused."""
    done = simulator(*arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert "hint: " in done.stderr
    return done.stderr


def test_a_wrong_comparison_is_an_error_with_a_hint(changed: list[str], tmp_path: Path) -> None:
    new, history, status = changed[0], changed[:3], changed[3:]
    nowhere = ["--history", "2026-11-27", "--url", "redis://127.0.0.1:1/0"]
    lacking = tmp_path / "lacking.csv"
    lacking.write_text(HISTORY.replace("sentiment", "gone").replace("echo", "gone"))
    for arguments, code, words in (
        ([new, "--history", str(lacking), *status], 2, "no class runs a model of gone for its service"),
        ([new, "--history", "no-such.csv", *status], 2, "no-such.csv: expected a readable CSV"),
        ([*history, "--status", new], 2, "queues.yaml: document: expected the output of `taxiway status --json`"),
        ([new, *nowhere], 4, "`taxiway up` starts a fleet"),
    ):
        assert words in refused("diff-config", *arguments, code=code)


SLO = ("--slo", "live=0.9")
LOAD = "size=20,duration=10"


def test_a_plan_prints_one_object_or_tables() -> None:
    rates = ("--rate", f"sentiment=20,service=live,{LOAD}", "--rate", f"sentiment=5,service=interactive,{LOAD}")
    given = ("plan", *rates, *SLO, "--slo", "interactive=0.95")
    done = simulator(*given, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["slo"] == {"live": 0.9, "standard": 0.95}
    assert all(answer["plan"]["attainment"][name] >= share for name, share in answer["slo"].items())
    (bought,) = answer["plan"]["mix"]
    assert (bought["hardware_class"], bought["usd_per_hour"]) == ("cpu.batch", 0.05 * bought["devices"])

    shown = simulator(*given).stdout
    assert "cpu.batch" in shown and "attained" in shown


@pytest.mark.cases("given, words")
def test_a_wrong_plan_is_an_error_with_exit_code_2(given: tuple[str, ...], words: str) -> None:
    done = simulator("plan", *given)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr and "Traceback" not in done.stderr
