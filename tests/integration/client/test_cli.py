"""The command line against a real router, with the smallest worker behind it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CommandLine
from tests.routing import EchoFleet


@pytest.fixture(autouse=True)
def address(echo: EchoFleet, cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands ask this router."""
    monkeypatch.setenv("TAXIWAY_URL", echo.router.http)


def test_submit_prints_the_answer_and_one_line_on_how_it_ran(cli: CommandLine) -> None:
    answer = cli.succeed("submit", "echo", "hello", "--deadline", "30")

    assert answer.stdout.startswith("payload  hello\necho:1  cpu.batch · echo · cpu:0")
    assert answer.stderr.startswith("job ")


@pytest.mark.cases("given, typed, payload")
def test_submit_sends_texts_a_file_or_what_is_typed_and_in_json_prints_nothing_else(
    cli: CommandLine, tmp_path: Path, given: list[str], typed: str | None, payload: Any
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")

    answer = cli.succeed("submit", "echo", *given, "--json", input=typed)

    assert json.loads(answer.stdout)["outputs"] == {"payload": payload}
    assert answer.stderr == ""


def test_a_job_that_was_not_waited_for_is_looked_after_by_its_id(cli: CommandLine) -> None:
    job = cli.succeed("submit", "echo", "--inputs", "[1, 2]", "--no-wait").stdout.strip()

    result = json.loads(cli.succeed("result", job, "--wait", "10", "--json").stdout)
    status = json.loads(cli.succeed("status", job, "--json").stdout)
    placement = json.loads(cli.succeed("explain", job, "--json").stdout)

    assert result["outputs"] == {"payload": [1, 2]}
    assert (status["state"], status["hardware_class"]) == ("succeeded", "cpu.batch")
    assert placement["reason"]
    assert [row["chosen"] for row in placement["considered"]].count(True) == 1
    assert "considered" in cli.succeed("explain", job).stdout
    assert "succeeded" in cli.succeed("status", job).stdout


def test_a_request_is_explained_without_being_submitted(cli: CommandLine) -> None:
    shown = cli.succeed("explain", "--what-if", "echo", "--text", "hello", "--deadline", "30").stdout
    answer = json.loads(
        cli.succeed("explain", "--what-if", "echo", "--text", "hello", "--locality", "moon", "--json").stdout
    )

    assert "cpu.batch" in shown
    assert "chosen" in shown
    assert (answer["error"], answer["hardware_class"]) == ("unplaceable", None)
    assert all("moon" in row["reason"] or "runs" in row["reason"] for row in answer["refused"])


def test_status_without_a_job_shows_the_fleet(cli: CommandLine) -> None:
    assert "cpu.batch" in cli.succeed("status").stdout
    assert json.loads(cli.succeed("status", "--json").stdout)["classes"]["cpu.batch"]["devices"] == 1


def test_models_are_listed(cli: CommandLine) -> None:
    assert "echo" in cli.succeed("models").stdout
    for arguments in (["echo", "--json"], ["--json", "echo"]):
        assert [model["name"] for model in json.loads(cli.succeed("models", *arguments).stdout)] == ["echo"]


def test_a_job_that_has_ended_is_reported_as_not_cancelled(cli: CommandLine) -> None:
    job = json.loads(cli.succeed("submit", "echo", "--text", "a", "--json").stdout)["id"]
    shown = cli("cancel", job, "--json")

    assert shown.exit_code == 2
    assert f"error: job {job} had already ended: succeeded" in shown.stderr
    status = json.loads(shown.stdout)
    assert (status["state"], status["cancelled"]) == ("succeeded", False)
