"""The command line against a real router, with the smallest worker behind it."""

import json
import secrets

import pytest
from click.testing import CliRunner

import taxiway
from local.embedded import EmbeddedValkey
from tasks.settings import settings_from
from taxiway.cli import main
from tests.routing import EchoDevice, eventually, router_process


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    with EmbeddedValkey(folder) as server:
        settings = settings_from(
            {"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": secrets.token_hex(32), "TAXIWAY_CACHE": str(folder)}
        )
        with router_process(settings) as router, EchoDevice(settings), taxiway.Client(router.http) as client:
            eventually(lambda: client.fleet()["devices"])
            yield router.http


@pytest.fixture
def cli(url):
    def run(*arguments, **settings):
        answer = CliRunner().invoke(main, [*arguments, "--url", url], **settings)
        assert answer.exit_code == 0, answer.output
        return answer

    return run


def test_submit_prints_the_answer_and_one_line_on_how_it_ran(cli):
    answer = cli("submit", "echo", "--text", "hello", "--deadline", "30")

    assert answer.stdout.startswith("payload  hello\necho:1  cpu.batch · echo · cpu:0")
    assert answer.stderr.startswith("job ")


def test_submit_in_json_prints_nothing_else(cli):
    answer = cli("submit", "echo", "--text", "a", "--text", "b", "--json")

    assert json.loads(answer.stdout)["outputs"] == {"payload": ["a", "b"]}
    assert answer.stderr == ""


def test_a_file_is_sent_as_it_is(cli, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")

    answer = json.loads(cli("submit", "echo", "--file", str(tmp_path / "photo.jpg"), "--json").stdout)

    assert answer["outputs"]["payload"] == {"__type__": "base64", "__value__": "/9j/"}


def test_standard_input_is_read(cli):
    assert json.loads(cli("submit", "echo", "-", "--json", input='{"a": 1}').stdout)["outputs"]["payload"] == {"a": 1}


def test_a_job_that_was_not_waited_for_is_looked_after_by_its_id(cli):
    job = cli("submit", "echo", "--inputs", "[1, 2]", "--no-wait").stdout.strip()

    result = json.loads(cli("result", job, "--wait", "10", "--json").stdout)
    status = json.loads(cli("status", job, "--json").stdout)
    placement = json.loads(cli("explain", job, "--json").stdout)

    assert result["outputs"] == {"payload": [1, 2]}
    assert (status["state"], status["hardware_class"]) == ("succeeded", "cpu.batch")
    assert placement["reason"]
    assert [row["chosen"] for row in placement["considered"]].count(True) == 1
    assert "considered" in cli("explain", job).stdout
    assert "succeeded" in cli("status", job).stdout


def test_a_request_is_explained_without_being_submitted(cli):
    shown = cli("explain", "--what-if", "echo", "--text", "hello", "--deadline", "30").stdout
    told = json.loads(cli("explain", "--what-if", "echo", "--text", "hello", "--locality", "moon", "--json").stdout)

    assert "cpu.batch" in shown
    assert "chosen" in shown
    assert (told["error"], told["hardware_class"]) == ("unplaceable", None)
    assert all("moon" in row["reason"] or "runs" in row["reason"] for row in told["refused"])


def test_status_without_a_job_shows_the_fleet(cli):
    assert "cpu.batch" in cli("status").stdout
    assert json.loads(cli("status", "--json").stdout)["classes"]["cpu.batch"]["devices"] == 1


def test_models_are_listed(cli):
    assert "echo" in cli("models").stdout
    assert [model["name"] for model in json.loads(cli("models", "echo", "--json").stdout)] == ["echo"]


def test_an_unknown_model_exits_with_2_and_a_hint(url):
    answer = CliRunner().invoke(main, ["submit", "ecko", "--text", "a", "--url", url])

    assert answer.exit_code == 2
    assert "did you mean" in answer.stderr
    assert "hint: `taxiway models`" in answer.stderr


def test_a_job_that_has_ended_is_not_cancelled_and_that_is_said(url, cli):
    job = json.loads(cli("submit", "echo", "--text", "a", "--json").stdout)["id"]
    told = CliRunner().invoke(main, ["cancel", job, "--url", url, "--json"])

    assert told.exit_code == 2
    assert f"error: job {job} had already ended: succeeded" in told.stderr
    status = json.loads(told.stdout)
    assert (status["state"], status["cancelled"]) == ("succeeded", False)
