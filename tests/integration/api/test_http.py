import asyncio
import concurrent.futures
import dataclasses
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import msgspec
import pytest
import redis

from api.inference.infer import Inference
from api.routing.router import HttpRouter
from local.embedded import EmbeddedValkey
from router.decide.basis import Basis, read_basis
from router.service.admission import Place, Rules
from tasks.models.folder import ModelsFolder, load_catalogue
from tasks.queues.queues_file import QueuesFile
from tasks.settings import Settings
from tasks.topology import load_topology
from taxiway.contract.job import read_meta, read_result
from taxiway.contract.keys import job_key, priority_lists, result_key, snapshot_key
from taxiway.contract.request import Request
from taxiway.errors import FleetUnavailable, TaxiwayError
from tests.command_line import program
from tests.narrowing import present
from tests.routing import EchoDevice, EchoFleet, echo_fleet, eventually, router_process
from tests.stored import fields_of
from tests.waiting import BUSY
from tests.working import empty_fleet

BASE64 = {"content_type": "base64"}


@pytest.fixture(scope="module")
def idle(valkey_url: str) -> Iterator[httpx.Client]:
    """The HTTP API of a router whose device answers nothing."""
    with echo_fleet(empty_fleet(valkey_url, lasting=True), answering=False) as fleet:
        yield fleet.http


def body(
    *rows: str, parameters: dict[str, Any] | None = None, tensor: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    named = {"name": "payload", "shape": [len(rows)], "datatype": "BYTES", "data": list(rows), **(tensor or {})}
    return {"inputs": [named], "parameters": {"deadline": 30, **(parameters or {})}, **fields}


def infer(
    http: httpx.Client, *rows: str, model: str = "echo", headers: dict[str, Any] | None = None, **arguments: Any
) -> httpx.Response:
    return http.post(f"/v2/models/{model}/infer", json=body(*rows, **arguments), headers=headers)


def accept(http: httpx.Client, *rows: str, **arguments: Any) -> str:
    accepted = infer(http, *rows, headers={"prefer": "respond-async"}, **arguments)
    assert accepted.status_code == 202, accepted.text
    return accepted.json()["id"]


def basis_of(state: redis.Redis, job: str) -> Basis:
    return present(read_basis(fields_of(state, job_key(job))["basis"]))


def test_a_large_text_waits_beside_its_message(echo: EchoFleet, state: redis.Redis) -> None:
    text = "x" * 2**20
    with echo.device.pause():
        job = accept(echo.http, text, "short")
        lists = priority_lists(echo.device.hardware_class)
        waiting = eventually(lambda: [one for name in lists for one in state.lrange(name, 0, -1)])
    assert len(waiting) == 1
    assert len(waiting[0]) < 2**16
    status = echo.http.get(f"/v2/jobs/{job}", params={"wait": 30}).json()
    assert (status["state"], status["hardware_class"], status["variant"]) == ("succeeded", "cpu.batch", "echo")
    assert echo.http.get(f"/v2/jobs/{job}/result").json()["outputs"][0]["data"] == [text, "short"]


def test_an_infer_request_is_answered_with_its_outputs_and_how_it_ran(http: httpx.Client) -> None:
    answer, named = infer(http, "a", "b").json(), infer(http, "a", id="mine").json()

    assert (answer["model_name"], answer["model_version"]) == ("echo", "1")
    assert answer["outputs"] == [{"name": "payload", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}]
    assert answer["parameters"]["hardware_class"] == "cpu.batch"
    assert (answer["parameters"]["job"], named["id"]) == (answer["id"], "mine")


def test_prefer_wait_limits_how_long_an_infer_call_waits(idle: httpx.Client) -> None:
    answer = infer(idle, "a", headers={"prefer": "wait=0"})

    where = answer.headers["location"]
    waiting = idle.get(where).json()
    assert (answer.status_code, where) == (202, f"/v2/jobs/{waiting['id']}")
    assert (waiting["state"], waiting["eta"] > 0) == ("queued", True)
    assert idle.get(f"{where}/result").status_code == 202


def test_a_long_poll_returns_as_soon_as_the_job_is_cancelled_and_there_is_no_result(idle: httpx.Client) -> None:
    job = accept(idle, "a")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        poll = pool.submit(lambda: idle.get(f"/v2/jobs/{job}", params={"wait": 20}))
        assert not concurrent.futures.wait([poll], timeout=0.3).done
        cancelled = time.monotonic()
        idle.delete(f"/v2/jobs/{job}")
        assert poll.result().json()["state"] == "cancelled"
    assert time.monotonic() - cancelled < 2 + BUSY
    answer = idle.get(f"/v2/jobs/{job}/result")
    assert (answer.status_code, answer.json()["code"]) == (409, "cancelled")


def test_a_placement_is_explained_with_what_was_not_chosen(http: httpx.Client) -> None:
    job = accept(http, "a")

    placement = http.get(f"/v2/jobs/{job}/placement").json()

    assert placement["reason"].startswith("cheapest")
    assert placement["note"] is None
    (chosen,) = [row for row in placement["considered"] if row["chosen"]]
    assert (chosen["hardware_class"], chosen["variant"]) == (placement["hardware_class"], placement["variant"])
    assert 0 < chosen["finish"] <= chosen["at_most"]
    assert {r["hardware_class"] for r in placement["considered"] + placement["refused"]} >= {"cpu.batch", "tpu.bulk"}


def test_a_job_keeps_little_for_its_explanation(http: httpx.Client, state: redis.Redis) -> None:
    job = accept(http, "a")

    assert len(fields_of(state, job_key(job))["basis"]) < 500
    assert state.ttl(snapshot_key(basis_of(state, job).snapshot)) > 3500


def test_when_the_fleets_state_is_gone_only_the_reason_is_left_and_a_note_says_so(
    http: httpx.Client, state: redis.Redis
) -> None:
    job = accept(http, "a")
    ended = msgspec.structs.replace(basis_of(state, job), snapshot="another")  # deleted, it would be so for other jobs
    state.hset(job_key(job), "basis", msgspec.json.encode(ended))

    placement = http.get(f"/v2/jobs/{job}/placement").json()

    assert placement["reason"].startswith("cheapest")
    assert (placement["considered"], placement["refused"]) == ([], [])
    assert "limits.keep_explanation" in placement["note"]


@pytest.mark.cases("field, value, note")
def test_a_choice_that_would_differ_now_or_cannot_be_made_is_reported(
    http: httpx.Client, state: redis.Redis, field: str, value: str, note: str
) -> None:
    job = accept(http, "a")
    state.hset(job_key(job), field, value)

    placement = http.get(f"/v2/jobs/{job}/placement").json()

    assert placement["reason"].startswith("cheapest")
    assert re.search(note, placement["note"], re.DOTALL)


@pytest.mark.parametrize("path", ["/v2/models/echo/placement", "/v2/models/echo/versions/1/placement"])
def test_a_request_is_explained_and_not_submitted(http: httpx.Client, state: redis.Redis, path: str) -> None:
    before = set(state.scan_iter(job_key("*")))

    answer = http.post(path, json=body("a"))

    reply = answer.json()
    assert answer.status_code == 200
    assert (reply["model"], reply["hardware_class"], reply["variant"]) == ("echo:1", "cpu.batch", "echo")
    assert reply["reason"].startswith("cheapest")
    assert set(state.scan_iter(job_key("*"))) == before


def test_a_request_that_could_not_be_placed_is_explained_with_what_was_in_its_way(http: httpx.Client) -> None:
    answer = http.post("/v2/models/echo/placement", json=body("a", parameters={"budget": 1e-15})).json()

    assert (answer["error"], answer["hardware_class"]) == ("invalid_request", None)
    assert answer["considered"][0]["why_not"].startswith("over budget")


def simulation(sweeps: int) -> dict[str, Any]:
    """The body of a request to ising."""
    named = {"size": 16, "temperature": 2.0, "sweeps": sweeps, "seed": 1}
    inputs = [
        {"name": name, "shape": [1], "datatype": "FP64" if name == "temperature" else "INT64", "data": [value]}
        for name, value in named.items()
    ]
    return {"inputs": inputs, "parameters": {"deadline": 30}}


@pytest.mark.parametrize("what", ["infer", "placement"])
def test_a_row_over_its_models_limit_is_refused_at_the_interface_with_both_figures(
    http: httpx.Client, what: str
) -> None:
    answer = http.post(f"/v2/models/ising/{what}", json=simulation(20_000_000))

    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert "expected at most 10000000, got 20000000" in answer.json()["error"]


@pytest.mark.cases("arguments, status, code, field")
def test_a_wrong_request_is_refused_by_name(
    http: httpx.Client, arguments: dict[str, Any], status: int, code: str, field: str | None
) -> None:
    answer = infer(http, "a", **arguments)

    reply = answer.json()
    assert (answer.status_code, reply["code"], reply["details"].get("field")) == (status, code, field)
    assert reply["error"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"inputs": 1}', b"[" * 100_000])
def test_a_body_that_is_no_infer_request_is_refused(http: httpx.Client, content: bytes) -> None:
    answer = http.post("/v2/models/echo/infer", content=content)

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    "sent",
    [
        b"content-length: 1000000000000\r\n\r\n{",
        b"transfer-encoding: chunked\r\n\r\n" + 17 * (b"100000\r\n" + bytes(2**20) + b"\r\n"),
    ],
    ids=["declared", "chunked"],
)
def test_a_body_over_the_limit_is_refused_before_it_is_read_whole(http: httpx.Client, sent: bytes) -> None:
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=20) as connection:
        connection.sendall(b"POST /v2/models/echo/infer HTTP/1.1\r\nhost: localhost\r\n" + sent)
        answer = connection.makefile("rb").readline()

    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.cases("method, path, status, code")
def test_every_error_has_one_form(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    answer = http.request(method, path)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert set(answer.json()) == {"error", "code", "details"}


@pytest.mark.cases("path, hint")
def test_an_unknown_path_is_answered_with_what_may_have_been_meant(http: httpx.Client, path: str, hint: str) -> None:
    said = http.post(path).json()["error"]
    assert (said["message"] if path.startswith("/v1/") else said).endswith(f"{path}: Not Found{hint}")


def test_a_wrong_parameter_of_a_query_is_answered_with_what_was_expected(http: httpx.Client) -> None:
    assert http.get("/v2/jobs/none?wait=soon").json()["error"] == "wait: Expected `float`, got `str`"


def test_without_a_device_the_answer_is_to_come_back_later(settings: Settings) -> None:
    with router_process(settings) as router, httpx.Client(base_url=router.http, timeout=30, trust_env=False) as http:
        answer = infer(http, "a")
        assert (answer.status_code, answer.json()["code"]) == (503, "no_device")
        assert int(answer.headers["retry-after"]) > 0
        assert http.get("/v2/models/echo/ready").status_code == 503
        eventually(lambda: infer(http, "a") and "at once: no live device can run" in http.get("/v2/fleet").text)


def test_a_class_whose_devices_are_started_when_they_are_wanted_takes_work_without_any(settings: Settings) -> None:
    with (
        router_process(settings, None, ["--starts", "cpu.batch"]) as router,
        httpx.Client(base_url=router.http, timeout=30, trust_env=False) as http,
    ):
        job = accept(http, "a")
        assert http.get(f"/v2/jobs/{job}").json()["hardware_class"] == "cpu.batch"


def test_a_router_does_not_start_for_a_class_that_is_not_there(settings: Settings) -> None:
    done = program("api", "--port", "0", "--starts", "cpu.bath", settings=settings)

    assert (done.returncode, done.stdout) == (2, "")
    assert "cpu.batch" in json.loads(done.stderr.splitlines()[-1])["error"]


@pytest.mark.cases("headers")
def test_a_page_of_another_site_may_not_ask_an_api_without_keys(http: httpx.Client, headers: dict[str, str]) -> None:
    answers = [infer(http, "a", headers=headers), http.get("/v2/health/live", headers=headers)]

    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(403, "forbidden")] * 2
    assert {answer.json()["details"]["header"] for answer in answers} == {*headers}


@pytest.mark.cases("headers")
def test_this_machine_may_ask_an_api_without_keys_by_each_of_its_own_names(
    http: httpx.Client, headers: dict[str, str]
) -> None:
    assert infer(http, "a", headers=headers).status_code == 200


def test_a_page_of_this_api_may_ask_it_and_one_whose_name_only_begins_so_may_not(http: httpx.Client) -> None:
    own = str(http.base_url).rstrip("/")
    answers = [http.post("/v2/dead/none/replay", headers={"origin": f"{own}{rest}"}) for rest in ("", ".example.org")]
    assert [answer.status_code for answer in answers] == [404, 403]


def test_models_and_fleet_are_described(http: httpx.Client) -> None:
    assert http.get("/v2").json()["name"] == "taxiway"
    assert http.get("/v2/health/live").status_code == http.get("/v2/health/ready").status_code == 200
    assert http.get("/v2/models/echo/ready").json() == {"name": "echo", "ready": True}
    assert http.get("/v2/models/echo").json()["inputs"] == [{"name": "payload", "datatype": "BYTES", "shape": [-1]}]
    assert "echo" in {m["name"] for m in http.get("/v2/models").json()["models"]}
    assert http.get("/v2/fleet").json()["devices"][0]["hardware_class"] == "cpu.batch"
    infer_path = http.get("/schema/openapi.json").json()["paths"]["/v2/models/{model}/infer"]
    assert "inputs" in infer_path["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]


def test_the_openapi_document_has_what_every_endpoint_refuses_and_which_need_no_key(http: httpx.Client) -> None:
    paths = http.get("/schema/openapi.json").json()["paths"]
    operations = {(verb, path): one for path, verbs in paths.items() for verb, one in verbs.items()}
    keyless = {path for (_, path), one in operations.items() if one.get("security") == [{}]}

    assert keyless == {"/v2/health/live", "/v2/health/ready", "/", "/docs"}
    for (verb, path), one in operations.items():
        refused = {"401", "403", "429", "500"} if path not in keyless else {"500"}
        assert refused <= one["responses"].keys(), f"{verb} {path}"


class Astray(HttpRouter):
    """Fails unexpectedly once it has forwarded a request."""

    async def forward(self, admitted: Place) -> NoReturn:
        await super().forward(admitted)
        raise KeyError(admitted.outgoing.job)


async def ended_astray(router: Astray) -> str:
    """A job that was forwarded so, and ended; where the machine stalls, another one than the first."""
    inference = Inference(router)
    while True:
        try:
            await router.fleet.read()
            await inference.accept(Request(model="echo", inputs="hello"))
        except KeyError as error:
            (job,) = error.args
            if (await router.jobs.record_and_result(job))[0]["state"] == "failed":
                return job
        except FleetUnavailable:
            await asyncio.sleep(0.05)


def test_a_request_whose_forwarding_failed_unexpectedly_is_not_left_to_run(settings: Settings) -> None:
    async def scenario() -> str:
        rules = Rules(load_topology(settings.queues), load_catalogue(settings.models), settings.secret)
        router = Astray(settings, rules, "astray", ModelsFolder(settings.models, QueuesFile(settings.queues)))
        try:
            return await asyncio.wait_for(ended_astray(router), 60)
        finally:
            await router.stop()

    with EchoDevice(settings, answering=False), redis.Redis.from_url(settings.broker) as state:
        meta = read_meta(state.get(result_key(asyncio.run(scenario()))))
    with pytest.raises(TaxiwayError, match="its log says why"):
        read_result(meta)


def test_with_its_broker_away_the_interface_says_so_within_two_seconds(tmp_path: Path, settings: Settings) -> None:
    with EmbeddedValkey(tmp_path / "valkey") as server:
        own = dataclasses.replace(settings, broker=server.url)
        with router_process(own) as router, httpx.Client(base_url=router.http, timeout=30, trust_env=False) as http:
            with EchoDevice(own, answering=False):
                waiting = accept(http, "a")
            server.stop()
            began = time.monotonic()
            answers = [infer(http, "a"), http.get(f"/v2/jobs/{waiting}")]
            took = time.monotonic() - began
            assert eventually(lambda: http.get("/v2/health/ready").status_code == 503)
            server.start()

    assert [(a.status_code, a.json()["code"]) for a in answers] == [(503, "broker_unavailable")] * 2
    assert took < 2 + BUSY
