"""The verbs of the simulator, as a person runs them."""

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import Result

from router.decide.plan import parse_plan
from simulator.__main__ import main
from simulator.policies.taxiway import POLICIES
from tests.builders import a_device
from tests.command_line import CommandLine

TREE = Path(__file__).parents[3]
FLEET = TREE / "simulator" / "fleets" / "azure-mixed.yaml"
simulator = CommandLine(main)

KEYS = ["policy", "requests", "attainment", "cost_usd", "score", "p50", "p99", "goodput", "moves", "utilisation"]
MORE = ["live_by_model", "p99_by_service", "starts_usd", "idle_usd", "refused", "usd_by_class"]


def test_a_comparison_prints_one_object_a_policy() -> None:
    spec = "poisson:rate=4,duration=60,seed=1"
    shown = simulator("simulate", "--trace", spec, "--fleet", str(FLEET), "--compare", "--json")
    assert (shown.exit_code, shown.stderr) == (0, "")
    objects = [json.loads(line) for line in shown.stdout.splitlines()]
    assert all(list(found) == KEYS + MORE for found in objects)
    assert all(list(found["attainment"]) == ["live", "standard", "bulk"] for found in objects)
    assert {*POLICIES} == {found["policy"] for found in objects}


def test_one_policy_is_shown_as_a_table() -> None:
    shown = simulator(
        "simulate", "--trace", "flash:rate=2,duration=60,at=20,length=10", "--fleet", str(FLEET), "--policy", "static"
    )
    assert shown.exit_code == 0
    assert "static" in shown.stdout
    assert "taxiway" not in shown.stdout


def test_a_fleet_file_and_a_queues_yaml_are_alternatives() -> None:
    shown = simulator("simulate", "--trace", "x.csv", "--fleet", "a.yaml", "--queues", "b.yaml")

    assert (shown.exit_code, "give either --queues or --fleet" in shown.stderr) == (2, True)


def test_who_looks_for_a_trial_is_told_where_it_is() -> None:
    stated = simulator("simulate", "--help").output

    assert "lab/README.md" in stated and (TREE / "lab" / "README.md").is_file()


def test_the_fleet_of_a_queues_yaml_is_simulated_by_its_models_profiles_and_what_it_learned(tmp_path: Path) -> None:
    given = ("--trace", "poisson:rate=4,duration=30,size=10", "--model", "sentiment", "--json")
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


@pytest.mark.parametrize(
    ("trace", "fleet", "words"),
    [
        ("poisson:rate=x", str(FLEET), "expected rate as a number"),
        ("no-such-file.csv", str(FLEET), "no-such-file.csv: expected a readable CSV"),
        ("poisson:rate=1,duration=9", "no-such-fleet.yaml", "no-such-fleet.yaml: document: expected a readable file"),
    ],
)
def test_wrong_usage_is_an_error_with_a_hint_and_exit_code_2(trace: str, fleet: str, words: str) -> None:
    shown = simulator("simulate", "--trace", trace, "--fleet", fleet)
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
        ([str(FLEET), *changed[1:]], 2, "hint: this is a fleet file"),
        ([*changed, "--old", str(FLEET)], 2, "hint: this is a fleet file"),
        ([new, "--history", str(lacking), *status], 2, "no class runs a model of gone for its service"),
        ([new, "--history", "no-such.csv", *status], 2, "no-such.csv: expected a readable CSV"),
        ([*history, "--status", new], 2, "queues.yaml: document: expected the output of `taxiway status --json`"),
        ([new, *nowhere], 4, "`taxiway up` starts a fleet"),
    ):
        assert words in refused("diff-config", *arguments, code=code)
    assert "hint: this is a queues.yaml: `--queues FILE`" in refused("simulate", "--trace", history[2], "--fleet", new)


PRICES = (TREE / "simulator" / "fleets" / "prices.csv").read_text()
SLO = ("--slo", "live=0.9", "--slo", "bulk=0.9")


def plan(folder: Path, prices: str, *arguments: str, fleet: Path = FLEET) -> Result:
    file = folder / "prices.csv"
    file.write_text(prices, encoding="utf-8")
    return simulator("plan", "--prices", str(file), "--fleet", str(fleet), *arguments)


def test_a_plan_prints_one_object_or_tables_and_says_what_is_wrong_with_exit_code_2(tmp_path: Path) -> None:
    given = ("--rate", "chat=2,duration=120", *SLO)
    output = plan(tmp_path, PRICES, *given, "--json")
    assert (output.exit_code, output.stderr) == (0, "")
    answer = json.loads(output.stdout)
    assert answer["slo"] == {"live": 0.9, "bulk": 0.9}
    assert all(answer["plan"]["attainment"][name] >= 0.9 for name in answer["slo"])
    assert [row["load"] for row in answer["loads"]] == [0.5, 1.0, 1.5]
    assert answer["loads"][1]["usd_per_hour"] == answer["plan"]["usd_per_hour"]
    assert answer["fleet_plan"] is None

    shown = plan(tmp_path, PRICES, *given).stdout
    assert all(row["instance"] in shown for row in answer["plan"]["mix"])

    for prices, arguments, words in (
        (PRICES.replace("1.2,", "0,"), given, "line 11: usd_per_hour: expected `float` > 0.0 (US dollars), got '0'"),
        (PRICES.replace("L4", "L5"), given, "classes.gpu.l4.accelerator: expected an accelerator of"),
        (PRICES, ("--rate", "chess=2", *SLO), "expected models that the fleet runs"),
        (PRICES, ("--trace", "poisson:rate=1", *given), "give either --trace or --rate"),
        (PRICES, ("--rate", "chat=2", "--slo", "live=2"), "a share above 0, at most 1, got live=2"),
        (PRICES, ("--rate", "chat=900,duration=60", *SLO), "the fleet has too few devices: gpu.a100 has at most 8"),
    ):
        output = plan(tmp_path, prices, *arguments)
        assert (output.exit_code, output.stdout) == (2, "")
        assert words in output.stderr
        assert "Traceback" not in output.stderr


def test_a_plan_for_a_queues_yaml_needs_no_other_file_and_takes_its_services() -> None:
    load = "size=20,duration=10"
    rates = ("--rate", f"sentiment=20,service=live,{load}", "--rate", f"sentiment=5,service=interactive,{load}")
    done = simulator("plan", *rates, "--slo", "live=0.9", "--slo", "interactive=0.95", "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["slo"] == {"live": 0.9, "standard": 0.95}
    (bought,) = answer["plan"]["mix"]
    assert (bought["hardware_class"], bought["usd_per_hour"]) == ("cpu.batch", 0.05 * bought["devices"])
    assert {cell["service"] for cell in answer["fleet_plan"]["cells"]} >= {"live"}


def test_a_plan_names_the_services_that_there_are() -> None:
    rate, of_trial = ("plan", "--rate", "sentiment=1"), ("--fleet", str(FLEET))
    every = "live, standard, bulk, interactive, urgent"
    for given, words in (
        ((*rate, "--slo", "nobody=0.5"), f"--slo: expected one of {every}, got nobody"),
        ((*rate, "--slo", "urgent=0.5", *of_trial), "--slo: expected one of live, standard, bulk, got urgent"),
        (
            ("plan", "--rate", "chat=1,service=x", *SLO, *of_trial),
            "--rate: expected a service of live, standard, bulk, got x",
        ),
        ((*rate, *SLO, "--prices", "x.csv"), "--prices is for --fleet: devices of queues.yaml cost what it says"),
    ):
        done = simulator(*given)
        assert (done.exit_code, words in done.stderr) == (2, True)


def test_a_plan_with_penalties_has_the_classes_and_rules_that_routers_would_follow(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET.read_text(encoding="utf-8") + "penalties: {live: 48, standard: 24, bulk: 12}\n")
    given = ("--rate", "chat=2,duration=20", *SLO)

    stated = plan(tmp_path, PRICES, *given, "--json", fleet=fleet)

    assert (stated.exit_code, stated.stderr) == (0, "")
    answer = json.loads(stated.stdout)
    followed = parse_plan(json.dumps(answer["fleet_plan"]).encode())
    assert {(cell.model, cell.service) for cell in followed.cells} >= {("chat", "live"), ("chat", "bulk")}
    assert set(followed.classes) <= {row["hardware_class"] for row in answer["plan"]["mix"]}
    shown = plan(tmp_path, PRICES, *given, fleet=fleet).stdout
    assert "classes, best first" in shown
