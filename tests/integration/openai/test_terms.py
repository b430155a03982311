"""Service terms at every endpoint that makes jobs: read, or refused, wherever they are given."""

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import celery
import httpx
import openai
import pytest
import yaml

import taxiway
from api.app import ENDPOINTS
from taxiway.contract.keys import ARRIVALS, INFER
from tests.builders import recorded
from tests.openai_fleet import QUEUES, OpenAIFleet, openai_fleet
from tests.producing import stop_listening
from tests.routing import HTTP, eventually
from tests.working import worker_process

BODIES: dict[str, Any] = yaml.safe_load(recorded("documents/terms.yaml"))
MADE: Mapping[str, Any] = BODIES["made"]
"""A body for each endpoint that makes jobs, or says where it would."""

NONE_MADE = {*BODIES["none made"]}
"""Paths of the other endpoints."""

CHAT: dict[str, Any] = BODIES["chat"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIFleet]:
    """A class with the label `lab`, and a cheaper one without it."""
    folder = tmp_path_factory.mktemp("terms")
    queues = QUEUES.replace("\nservice:", f"\n{recorded('fleets/cheap_class.yaml')}service:")
    with (
        openai_fleet(folder, ["--files", str(folder / "files")], queues) as fleet,
        worker_process(fleet.settings, "--class", "cheap.out"),
    ):
        eventually(lambda: where(post(fleet, "/v1/chat/completions", MADE["/v1/chat/completions"])) == "cheap.out")
        yield fleet


def post(fleet: OpenAIFleet, path: str, body: Any, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HTTP.post(fleet.router.http + path, json=body, headers=named)


def where(answer: httpx.Response) -> str:
    assert answer.is_success, answer.text
    return str(answer.json()["taxiway"]["hardware_class"])


def call(fleet: OpenAIFleet, path: str) -> tuple[str, dict[str, Any]]:
    """A call of an endpoint as its path and body."""
    body = dict(MADE[path])
    if path == "/v1/batches":
        body["input_file_id"] = upload(fleet, {"model": "talk", **CHAT})
    named = path.replace("{version:str}", "1").replace("{dead_letter:str}", "none")
    return named.replace("{model:str}", "tale" if "generate" in path else "talk"), body


def upload(fleet: OpenAIFleet, *bodies: Any) -> str:
    lines = [
        {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    with openai.OpenAI(base_url=fleet.url, api_key="none") as client:
        return client.files.create(file=("lines.jsonl", content), purpose="batch").id


def run_batch(fleet: OpenAIFleet, *bodies: Any, **headers: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An ended batch, and its lines."""
    body = {**MADE["/v1/batches"], "input_file_id": upload(fleet, *bodies)}
    made = post(fleet, "/v1/batches", body, **headers)
    assert made.is_success, made.text

    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = read(fleet, f"/batches/{made.json()['id']}").json()
        return found if found["status"] in ("completed", "failed", "expired", "cancelled") else None

    batch = eventually(ended)
    files = [name for name in (batch["output_file_id"], batch["error_file_id"]) if name]
    texts = [read(fleet, f"/files/{name}/content").text for name in files]
    return batch, [json.loads(line) for text in texts for line in text.splitlines()]


def answered(fleet: OpenAIFleet, response: str) -> httpx.Response:
    def ended() -> httpx.Response | None:
        answer = read(fleet, f"/responses/{response}")
        return answer if answer.json()["taxiway"] else None

    found: httpx.Response = eventually(ended)
    return found


def read(fleet: OpenAIFleet, path: str) -> httpx.Response:
    return HTTP.get(fleet.url + path)


def test_every_endpoint_that_takes_a_request_is_known_here() -> None:
    paths = {path for one in ENDPOINTS if "POST" in one.http_methods for path in one.paths}
    assert paths == MADE.keys() | NONE_MADE


@pytest.mark.parametrize("path", MADE)
def test_a_label_that_nobody_has_is_an_error(fleet: OpenAIFleet, path: str) -> None:
    named, body = call(fleet, path)
    answer = post(fleet, named, body, x_taxiway_locality="nowhere")
    if "placement" in path:  # what would become of it
        assert (answer.json()["error"], "'nowhere'" in answer.text) == ("unplaceable", True)
    else:
        assert answer.status_code in (400, 422) and "nowhere" in answer.text, answer.text


@pytest.mark.parametrize("path", MADE)
def test_a_header_of_ours_that_nobody_reads_is_an_error(fleet: OpenAIFleet, path: str) -> None:
    named, body = call(fleet, path)
    answer = post(fleet, named, body, x_taxiway_localty="lab")
    assert (answer.status_code, "x-taxiway-localty: expected no such header" in answer.text) == (400, True)


@pytest.mark.parametrize("path", [path for path in MADE if path.startswith("/v1/")])
def test_a_term_in_a_body_is_read(fleet: OpenAIFleet, path: str) -> None:
    named, body = call(fleet, path)
    answer = post(fleet, named, {**body, "locality": "nowhere"})
    assert (answer.status_code, "'nowhere'" in answer.text) == (422, True)
    answer = post(fleet, named, {**body, "priority": -100})
    assert (answer.status_code, "X-Taxiway-Priority: expected one of" in answer.text) == (400, True)


def test_a_term_is_given_once(fleet: OpenAIFleet) -> None:
    path = "/v1/chat/completions"
    answer = post(fleet, path, {**MADE[path], "locality": "lab"}, x_taxiway_locality="nowhere")
    assert answer.json()["error"]["message"].startswith("X-Taxiway-Locality: expected it once, in the body or as")
    assert where(post(fleet, path, {**MADE[path], "locality": "lab", "service": "patient"})) == "cpu.batch"
    answer = post(fleet, path, {**MADE[path], "service": "standard", "service_tier": "flex"})
    assert answer.json()["error"]["message"].startswith("service_tier: expected nothing beside a service")
    answer = post(fleet, path, MADE[path], x_taxiway_service="nobody's")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Taxiway-Service")


def test_the_lines_of_a_batch_have_its_terms(fleet: OpenAIFleet) -> None:
    chats = [MADE["/v1/chat/completions"]] * 6
    batch, lines = run_batch(fleet, *chats, x_taxiway_locality="lab")
    assert batch["status"] == "completed"
    assert {line["response"]["body"]["taxiway"]["hardware_class"] for line in lines} == {"cpu.batch"}

    batch, lines = run_batch(fleet, *chats, x_taxiway_budget="1e-12")
    assert batch["request_counts"] == {"total": 6, "completed": 0, "failed": 6}
    assert {line["response"]["body"]["error"]["param"] for line in lines} == {"X-Taxiway-Budget"}

    batch, lines = run_batch(fleet, {**chats[0], "locality": "lab"})
    assert (batch["status"], batch["errors"]["data"][0]["param"]) == ("failed", "X-Taxiway-Locality")


@pytest.mark.parametrize("header", ["X-Taxiway-Deadline", "Idempotency-Key"])
def test_a_batch_refuses_what_it_does_not_have(fleet: OpenAIFleet, header: str) -> None:
    path, body = call(fleet, "/v1/batches")
    answer = post(fleet, path, body, **{header: "5"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, header)


def test_a_response_has_the_label_of_the_one_that_it_continues(fleet: OpenAIFleet) -> None:
    path, more = "/v1/responses", {"model": "talk", "input": "more"}
    private = post(fleet, path, {"model": "talk", "input": "private"}, x_taxiway_locality="lab").json()["id"]
    for background in (False, True):
        asked = {**more, "previous_response_id": private, "background": background}
        name = post(fleet, path, asked).json()["id"]
        assert where(answered(fleet, name)) == "cpu.batch"
        private = name
    answer = post(fleet, path, {**more, "previous_response_id": private}, x_taxiway_locality="elsewhere")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Taxiway-Locality")
    assert where(post(fleet, path, {**more, "previous_response_id": private}, x_taxiway_locality="lab")) == "cpu.batch"
    assert where(post(fleet, path, more)) == "cheap.out"


IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
STEERING: list[dict[str, Any]] = [
    {"kv_transfer_params": {"remote_host": "169.254.169.254"}},
    {"cache_salt": "of another"},
    {"custom_logit_processor": "code"},
    {"messages": [{"role": "user", "content": [IMAGE]}]},
]


@pytest.mark.parametrize("fields", STEERING, ids=lambda fields: next(iter(fields)))
def test_what_steers_an_engine_reaches_none_that_does_not_forward_it(
    fleet: OpenAIFleet, fields: dict[str, Any]
) -> None:
    sent, name = len(fleet.engine.chats), next(iter(fields))
    chat = post(fleet, "/v1/chat/completions", {**MADE["/v1/chat/completions"], **fields})
    assert (chat.status_code, chat.json()["error"]["code"]) == (400, "unsupported_parameter")
    escaped = json.dumps({**CHAT, **fields}).replace(name, f"\\u{ord(name[0]):04x}{name[1:]}")
    hidden = escaped.replace("messages", "\\u006dessages")
    binary = base64.b64encode(escaped.encode()).decode()
    for data, parameters in (([{**CHAT, **fields}], {}), ([hidden], {}), ([binary], {"content_type": "base64"})):
        tensor = {"name": "request", "shape": [1], "datatype": "BYTES", "data": data, "parameters": parameters}
        answer = post(fleet, "/v2/models/talk/infer", {"inputs": [tensor]})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request"), answer.text
    batch, _ = run_batch(fleet, {"model": "talk", **CHAT, **fields})
    assert batch["request_counts"]["failed"] == 1
    assert len(fleet.engine.chats) == sent


@pytest.mark.parametrize("term", [{"locality": "lab"}, {"priority": "high"}, {"idempotency_key": "k"}])
def test_a_term_inside_a_chat_is_no_field_of_the_chat(fleet: OpenAIFleet, term: dict[str, str]) -> None:
    tensor = {"name": "request", "shape": [1], "datatype": "BYTES", "data": [{**CHAT, **term}]}
    answer = post(fleet, "/v2/models/talk/infer", {"inputs": [tensor]})
    assert (answer.status_code, answer.json()["details"]["asked"]) == (400, [*term])


def test_what_a_class_forwards_is_placed_there_and_reaches_its_engine(fleet: OpenAIFleet) -> None:
    answer = post(fleet, "/v1/chat/completions", {**MADE["/v1/chat/completions"], "chat_template": "mine"})
    assert (where(answer), fleet.engine.chats[-1]["chat_template"]) == ("cheap.out", "mine")
    asked = {**MADE["/v1/chat/completions"], "chat_template": "mine", "locality": "lab"}
    assert post(fleet, "/v1/chat/completions", asked).status_code == 400


def test_a_number_beyond_all_bounds_is_refused_at_the_broker_too(fleet: OpenAIFleet) -> None:
    most = {**CHAT, "max_tokens": 10**400}
    app = celery.Celery(broker=fleet.settings.broker, backend=fleet.settings.broker)
    with taxiway.Client(fleet.settings.broker) as client, contextlib.closing(app):
        for chat in (most, json.dumps(most)):
            with pytest.raises(
                taxiway.InvalidRequestError, match=r"request\.max_tokens: expected an integer from 1 to"
            ):
                client.submit("talk", chat).result(timeout=30)
            sent = app.send_task(INFER, kwargs={"model": "talk", "inputs": chat}, queue=ARRIVALS)
            with pytest.raises(Exception, match=r"request\.max_tokens: expected an integer from 1 to"):
                sent.get(timeout=30)
        stop_listening(app)
