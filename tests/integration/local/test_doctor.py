"""What the doctor says of a server of the user's."""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from local.doctor import check_endpoints, configuration, reported, servers, site_key
from local.embedded import find_binary, free_port
from local.fleet import LocalFleet
from tasks.models.folder import ProcessReport
from tasks.settings import TREE, Settings
from taxiway.contract.keys import CATALOGUES, CATALOGUES_SEEN
from tests.builders import recorded
from tests.engine import Engine, serving
from tests.graphs import SCALE_SPECS, scale_graph, write_model
from tests.routing import RouterProcess, router_process
from tests.waiting import until


@pytest.fixture
def open_server() -> Iterator[str]:
    """A Valkey that lets anybody in."""
    port = free_port()
    command: list[str | Path] = [find_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        url = f"redis://127.0.0.1:{port}/0"
        with redis.Redis.from_url(url, retry=Retry(ConstantBackoff(0.05), 100)) as client:
            client.ping()
        yield url
        process.terminate()


def test_a_server_without_a_password_is_reported_and_one_with_a_password_is_not(
    open_server: str, valkey_url: str
) -> None:
    said = [{one.subject: one for one in servers({"TAXIWAY_BROKER": url})} for url in (open_server, valkey_url)]
    assert all(one["TAXIWAY_BROKER"].found for one in said)
    assert not said[0]["TAXIWAY_BROKER guard"].found
    assert "TAXIWAY_BROKER guard" not in said[1]


def test_a_server_that_refuses_the_account_is_not_said_to_be_stopped_and_no_password_is_said(valkey_url: str) -> None:
    remedies = {}
    for at in (valkey_url.rpartition("@")[2], "127.0.0.1:1/0"):
        found = servers({"TAXIWAY_BROKER": f"redis://:secret-word@{at}"})
        [finding] = [one for one in found if one.subject == "TAXIWAY_BROKER"]
        assert not finding.found and "secret-word" not in repr(found)
        remedies[at] = finding.remedy
    refused, away = remedies.values()
    assert refused == "correct the account in TAXIWAY_BROKER" != away


def test_an_address_that_cannot_be_read_is_named_without_its_password() -> None:
    found = list(servers({"TAXIWAY_BROKER": "redis://:secret-word@[::1/0"}))
    [finding] = [one for one in found if one.subject == "TAXIWAY_BROKER"]
    assert (finding.found, finding.value) == (False, "not an address")
    assert "secret-word" not in repr(found)


def test_what_is_wrong_with_the_configuration_is_named_with_what_to_do(tmp_path: Path) -> None:
    write_model(tmp_path / "models", "scale", scale_graph(2.0), **SCALE_SPECS)
    (tmp_path / "models" / "scale" / "graph.onnx").unlink()
    queues = (TREE / "queues.yaml").read_text().replace("warm: [classify-image]", "warm: []")
    (tmp_path / "queues.yaml").write_text(
        queues.replace("warm: [embed]", "warm: [scal]").replace("[sentiment, echo]", "[]")
    )
    paths = {"TAXIWAY_QUEUES": str(tmp_path / "queues.yaml"), "TAXIWAY_MODELS": str(tmp_path / "models")}
    found = {one.subject: one for one in configuration(paths)}
    assert set(found) == {"queues.yaml", "scale"}
    assert not any(one.found for one in found.values())
    assert "artefacts.graph.path: expected a file in scale/" in found["scale"].value
    assert [one.subject for one in configuration({})] == ["queues.yaml and models"]


def local_fleet(router: RouterProcess) -> LocalFleet:
    """A fleet whose router this is."""
    return LocalFleet(
        broker="", http=router.http, flower=None, pid=0, router_pid=router.process.pid, data="", workers=(), timeout=0.0
    )


def test_a_fleet_with_labels_or_peers_needs_a_key_that_signs_its_receipts(tmp_path: Path) -> None:
    edge = {"TAXIWAY_QUEUES": str(TREE / "examples" / "sites" / "edge" / "queues.yaml")}
    key = tmp_path / "site.key"
    (missing,) = site_key(edge, None)
    assert (missing.found, missing.value) == (False, "receipts of placements are not signed")
    key.write_text("no key")
    (wrong,) = site_key(edge | {"TAXIWAY_SITE_KEY": str(key)}, None)
    assert not wrong.found
    assert "expected a file with 64 hexadecimal digits" in wrong.value
    key.write_text("ab" * 32)
    assert [
        one.found for variables in (edge | {"TAXIWAY_SITE_KEY": str(key)}, edge) for one in site_key(variables, key)
    ] == [True, True]
    cloud = {"TAXIWAY_QUEUES": str(TREE / "examples" / "sites" / "cloud" / "queues.yaml")}
    assert not list(site_key(cloud, None)), "neither labels nor peers"


def test_a_process_that_goes_by_an_older_queues_yaml_is_to_be_restarted(settings: Settings, tmp_path: Path) -> None:
    queues = tmp_path / "queues.yaml"
    queues.write_text((TREE / "queues.yaml").read_text())
    with router_process(replace(settings, queues=queues)) as router:
        fleet = local_fleet(router)
        assert reported(fleet, {}) == []
        queues.write_text(queues.read_text() + "plan: {enabled: false}\n")
        assert until(
            lambda: (
                [one.remedy for one in reported(fleet, {})]
                == ["end them one after the other, so that they start again"]
            )
        )


def test_the_state_stores_file_and_clocks_that_differ_from_its_own_are_reported(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"TAXIWAY_BROKER": settings.broker}
    assert "TAXIWAY_BROKER clock of this machine" not in [one.subject for one in servers(variables)]
    [disk] = [one for one in servers(variables) if one.subject == "TAXIWAY_BROKER disk"]
    assert (disk.found, disk.value.startswith("append-only file of ")) == (True, True)
    now = time.time()
    monkeypatch.setattr("local.doctor.time.time", lambda: now - 300)
    [here] = [one for one in servers(variables) if "clock" in one.subject]
    assert (here.found, here.value) == (False, "300 s behind the state store's, which deadlines follow")


def test_a_process_whose_host_has_another_time_is_reported(settings: Settings) -> None:
    lags = msgspec.json.encode(ProcessReport(kind="worker", clock=-90))
    with router_process(settings) as router, redis.Redis.from_url(settings.broker) as store:
        store.hset(CATALOGUES, "cpu.batch.cpu-0@far", lags)
        store.zadd(CATALOGUES_SEEN, {"cpu.batch.cpu-0@far": time.time()})
        assert [(one.subject, one.value) for one in reported(local_fleet(router), {})] == [
            ("clock of cpu.batch.cpu-0@far", "90 s behind the state store's, which deadlines follow")
        ]


def test_every_endpoint_is_asked_for_its_models_and_a_token(tmp_path: Path) -> None:
    with serving(Engine(models=["served", "served"])) as engine:  # llama.cpp lists each twice
        (tmp_path / "queues.yaml").write_text(recorded("documents/doctor.yaml").replace("{url}", engine.url))
        found = {one.subject: one for one in check_endpoints({"TAXIWAY_QUEUES": str(tmp_path / "queues.yaml")})}
        url = engine.url
        assert [body["max_tokens"] for body in engine.chats] == [1]
    assert found[f"endpoint engine {url}"].value == "answers, and lists served"
    assert found[f"endpoint engine {url} embed"].value == "the endpoint lists no model 'other'"
    assert found[f"endpoint engine {url} token"].found
    assert found[f"endpoint renamed {url} chat"].value == "the endpoint lists no model 'other'"
    assert f"endpoint renamed {url} token" not in found
    gone = found["endpoint engine http://127.0.0.1:1/v1"]
    assert (gone.found, gone.remedy) == (False, "start the server, or correct endpoint.url")
    assert found[f"endpoint paid {url}"].value == "PAID_KEY is not set"
    assert found[f"endpoint lost {url}/nowhere"].remedy.startswith("correct endpoint.url")
