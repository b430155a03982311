"""Webhooks by real routers to a real receiver: signed, in order, tried again, given up, sent again."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis
from standardwebhooks import Webhook

from api.access import SCOPES, Scope
from taxiway import Client
from taxiway.contract.keys import WEBHOOKS_DUE
from tests.keyring import keys_in, secret_of
from tests.openai_fleet import QUEUES, OpenAIFleet, openai_fleet
from tests.receiver import Delivery, Receiver, receiving
from tests.routing import HTTP, eventually, router_process

BOTH: tuple[Scope, ...] = ("submit", "read")
WEBHOOKS = """
webhooks: {{http: true, networks: [127.0.0.2/32], timeout: 5, pause: 0.1, longest_pause: 0.2, retry: 4, endpoints: 50}}
"""
JOBS = ["job.completed", "job.failed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("webhooks")


@pytest.fixture(scope="module")
def options(folder: Path) -> list[str]:
    return [*keys_in(folder / "keys", lab=BOTH, shop=BOTH, root=SCOPES), "--files", str(folder / "files")]


@pytest.fixture(scope="module")
def fleet(folder: Path, options: list[str]) -> Iterator[OpenAIFleet]:
    with openai_fleet(folder, options, QUEUES + WEBHOOKS, secret_of("lab")) as fleet:
        yield fleet


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving("127.0.0.2") as receiver:
        yield receiver


@contextmanager
def client(fleet: OpenAIFleet, name: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=fleet.url, api_key=secret_of(name), max_retries=0, timeout=30) as client:
        yield client


@contextmanager
def endpoint(fleet: OpenAIFleet, receiver: Receiver, types: list[Any] = JOBS, **more: Any) -> Iterator[Any]:
    """An endpoint of the tenant lab, which is removed at the end."""
    with client(fleet, "root") as root:
        fields = {"tenant": "lab", **more}
        made = root.webhooks.create(name="hook", url=receiver.url, event_types=types, extra_body=fields)
        try:
            yield made
        finally:
            root.webhooks.delete(made.id)


def ask(fleet: OpenAIFleet, text: str = "Hello", name: str = "lab", **headers: str) -> str:
    """The id of a chat's job, once it has ended."""
    body = {"model": "talk", "messages": [{"role": "user", "content": text}]}
    answer = call(fleet, "/v1/chat/completions", body, name, **headers)
    return answer.headers["x-request-id"]


def call(fleet: OpenAIFleet, path: str, body: Any = None, name: str = "root", **headers: str) -> httpx.Response:
    method = "GET" if body is None else "POST"
    head = {"authorization": f"Bearer {secret_of(name)}", **headers}
    return HTTP.request(method, f"{fleet.router.http}{path}", json=body, headers=head)


def came(receiver: Receiver, name: str, times: int = 1) -> list[Delivery]:
    found: list[Delivery] = eventually(lambda: len(receiver.about(name)) >= times and receiver.about(name))
    return found


def test_a_jobs_end_is_delivered_and_both_libraries_verify_it(fleet: OpenAIFleet, receiver: Receiver) -> None:
    with endpoint(fleet, receiver) as made, client(fleet, "lab") as lab:
        job = ask(fleet)
        (delivery,) = came(receiver, job)
        event: Any = lab.webhooks.unwrap(delivery.body, delivery.headers, secret=made.signing_secret)

        assert (event.type, event.data.id, event.id) == ("job.completed", job, delivery.headers["webhook-id"])
        assert event.object == "event"
        assert Webhook(made.signing_secret).verify(delivery.body, delivery.headers) == delivery.event
        assert delivery.event["data"] == {"id": job, "model": "talk:1", "state": "succeeded"}
        with pytest.raises(openai.InvalidWebhookSignatureError):
            lab.webhooks.unwrap(delivery.body + b" ", delivery.headers, secret=made.signing_secret)
        assert call(fleet, f"/v2/jobs/{job}", name="lab").json()["id"] == job


def test_a_job_that_fails_has_an_event_with_its_error_also_if_refused_after_acceptance(
    fleet: OpenAIFleet, receiver: Receiver
) -> None:
    with endpoint(fleet, receiver, ["job.failed"]):
        ask(fleet)
        failed = ask(fleet, "status=400 no such tool")
        with Client(fleet.settings.broker) as producer:
            refused = producer.submit("nothing", "x", tenant="lab").id
        stated = {one.event["data"]["id"]: one.event for one in (*came(receiver, failed), *came(receiver, refused))}

    assert {one["type"] for one in stated.values()} == {"job.failed"}
    assert stated[failed]["data"]["error"] == {"code": "invalid_request"}
    assert stated[refused]["data"]["error"]["code"] == "unknown_model"
    assert len(receiver.ids) == 2  # and nothing of the one that succeeded


def test_a_batch_has_an_event_and_its_lines_have_none(fleet: OpenAIFleet, receiver: Receiver) -> None:
    types = [*JOBS, "batch.completed", "batch.failed", "batch.cancelled", "batch.expired"]
    with endpoint(fleet, receiver, types) as made, client(fleet, "lab") as lab:
        batches = [begin(lab, 3, "/v1/chat/completions"), begin(lab, 3, "/v1/embeddings")]
        stated = [came(receiver, batch)[0] for batch in batches]
        assert [one.event["type"] for one in stated] == ["batch.completed", "batch.failed"]
        event = lab.webhooks.unwrap(stated[0].body, stated[0].headers, secret=made.signing_secret)
        assert isinstance(event, openai.types.webhooks.BatchCompletedWebhookEvent)
        assert event.data.id == batches[0]
        assert len(receiver.ids) == 2


def test_a_response_in_the_background_has_one_event(fleet: OpenAIFleet, receiver: Receiver) -> None:
    types = ["response.completed", "response.failed", "response.cancelled"]
    with endpoint(fleet, receiver, types, only_named=True) as made, client(fleet, "lab") as lab:
        texts = {made.id: "Hello", made.name: "status=400 no", made.url: "told stall"}
        asked: dict[str, Any] = {"model": "talk", "background": True}
        names = [
            lab.responses.create(input=text, extra_headers={"x-taxiway-webhook": webhook}, **asked).id
            for webhook, text in texts.items()
        ]
        lab.responses.cancel(names[2])
        lab.responses.create(model="talk", input="Hello", background=True)
        stated = [came(receiver, name)[0] for name in names]
        assert [one.event["type"].partition(".")[2] for one in stated] == ["completed", "failed", "cancelled"]
        event = lab.webhooks.unwrap(stated[0].body, stated[0].headers, secret=made.signing_secret)
        assert isinstance(event, openai.types.webhooks.ResponseCompletedWebhookEvent)
        assert lab.responses.retrieve(event.data.id).output_text.startswith("Hello")
        for name in names:
            lab.responses.retrieve(name)
        assert len(receiver.ids) == 3


def begin(lab: openai.OpenAI, lines: int, url: Any) -> str:
    """A batch of chats; of another call it fails."""
    body = {"model": "talk", "messages": [{"role": "user", "content": "Hello"}]}
    asked = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(lines)]
    content = "\n".join(map(json.dumps, asked)).encode()
    file = lab.files.create(file=("lines.jsonl", content), purpose="batch").id
    return lab.batches.create(input_file_id=file, endpoint=url, completion_window="24h").id


def test_what_fails_is_tried_again_under_the_same_id_before_what_follows(
    fleet: OpenAIFleet, receiver: Receiver
) -> None:
    answers = iter([(500, {}), (302, {"location": f"{receiver.url}/elsewhere"}), (200, {})])
    receiver.answer = lambda _: next(answers, (200, {}))
    with endpoint(fleet, receiver):
        jobs = [ask(fleet, f"turn {turn}") for turn in range(5)]
        came(receiver, jobs[-1])

    assert [one.event["data"]["id"] for one in receiver.deliveries] == [jobs[0], jobs[0], *jobs]
    assert len({one.headers["webhook-id"] for one in receiver.about(jobs[0])}) == 1


def test_what_is_not_taken_in_time_is_kept_and_sent_again_on_request(fleet: OpenAIFleet, receiver: Receiver) -> None:
    receiver.answer = lambda _: (503, {})
    with endpoint(fleet, receiver) as made:
        job = ask(fleet)
        path = f"/v1/webhook_endpoints/{made.id}"
        (dead,) = eventually(lambda: call(fleet, f"{path}/dead_letters", name="lab").json()["data"])
        tried = len(receiver.deliveries)
        assert (dead["type"], dead["event"]["data"]["id"], dead["attempts"]) == ("job.completed", job, tried)
        assert (dead["fault"], tried > 5) == ("the endpoint answered 503", True)
        seen = call(fleet, path).json()
        assert (seen["dead"], seen["waiting"]) == (1, 0)
        assert b"\ntaxiway_webhook_events_dead 1.0\n" in call(fleet, "/metrics").content

        receiver.answer = lambda _: (200, {})
        assert call(fleet, f"{path}/dead_letters/replay", {"events": ["evt_other"]}).json() == {"replayed": 0}
        assert call(fleet, f"{path}/dead_letters/replay", {"events": [dead["id"]]}).json() == {"replayed": 1}
        again = came(receiver, job, tried + 1)[-1]
        assert again.body == receiver.deliveries[0].body
        assert call(fleet, path).json()["dead"] == 0


def test_a_secret_is_shown_once_and_rotated_without_a_gap(fleet: OpenAIFleet, receiver: Receiver) -> None:
    with endpoint(fleet, receiver) as made, client(fleet, "root") as root:
        rotated = root.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        assert made.signing_secret != rotated.signing_secret
        for shown in (root.webhooks.retrieve(made.id), root.webhooks.list().data[0]):
            assert made.signing_secret[6:] not in shown.to_json()
            assert rotated.signing_secret[6:] not in shown.to_json()
        (delivery,) = came(receiver, ask(fleet))
        for secret in (made.signing_secret, rotated.signing_secret):
            Webhook(secret).verify(delivery.body, delivery.headers)

        root.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=False)
        (delivery,) = came(receiver, ask(fleet))
        assert len(delivery.headers["webhook-signature"].split()) == 1


def test_an_endpoint_is_changed_by_its_tenants_keys_and_not_there_for_another(
    fleet: OpenAIFleet, receiver: Receiver
) -> None:
    with endpoint(fleet, receiver) as made:
        path = f"/v1/webhook_endpoints/{made.id}"
        statuses = {name: call(fleet, path, name=name).status_code for name in ("lab", "shop", "root")}
        assert statuses == {"lab": 200, "shop": 404, "root": 200}
        assert call(fleet, f"{path}/dead_letters", name="shop").status_code == 404
        assert call(fleet, "/v1/webhook_endpoints", name="shop").json()["data"] == []
        assert call(fleet, f"{path}/rotate_secret", {}, name="lab").status_code == 403
        ask(fleet, name="shop")
        assert receiver.deliveries == []
        assert call(fleet, path, {"name": "other", "event_types": ["batch.failed"]}).status_code == 200
        found = call(fleet, path).json()
        assert (found["name"], found["event_types"], found["url"]) == ("other", ["batch.failed"], receiver.url)


def test_a_name_that_resolves_to_a_private_address_is_not_connected_to(fleet: OpenAIFleet) -> None:
    with receiving("127.0.0.1") as receiver:
        receiver.url = receiver.url.replace("127.0.0.1", "localhost")  # outside the networks that are allowed
        with endpoint(fleet, receiver, only_named=True) as made:
            asked = {"event_type": "job.completed"}
            answer = call(fleet, f"/v1/webhook_endpoints/{made.id}/test", asked)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "url")
        assert "is not a public address" in answer.json()["error"]["message"]
    assert receiver.deliveries == []


def test_a_sample_is_sent_at_once(fleet: OpenAIFleet, receiver: Receiver) -> None:
    receiver.answer = lambda _: (418, {})
    with endpoint(fleet, receiver) as made, client(fleet, "root") as root:
        tested = root.webhooks.test(made.id, event_type="batch.completed")
    assert (tested.status_code, receiver.events[0]["type"]) == (418, "batch.completed")


def test_two_routers_send_one_event_at_a_time_and_one_that_is_killed_loses_none(
    fleet: OpenAIFleet, options: list[str], receiver: Receiver
) -> None:
    def settled() -> None:
        """Wait until the store knows that all events were delivered: what a router took goes out again."""
        with redis.Redis.from_url(fleet.settings.broker) as store:
            eventually(lambda: store.zcard(WEBHOOKS_DUE) == 0)

    with endpoint(fleet, receiver), router_process(fleet.settings, options=options) as other:
        eventually(lambda: call(replace(fleet, router=other), "/v2/models/talk/ready").is_success)
        jobs = [ask(fleet, f"of both {turn}") for turn in range(5)]
        came(receiver, jobs[-1])
        settled()
        assert receiver.most_at_once == 1

        fleet.router.process.send_signal(signal.SIGSTOP)  # so the other router delivers
        killed = threading.Event()
        receiver.answer = lambda _: (200 if killed.wait(60) else 500, {})
        try:
            held = [ask(replace(fleet, router=other), f"of one {turn}") for turn in range(5)]
            came(receiver, held[0])
            other.process.kill()
        finally:
            fleet.router.process.send_signal(signal.SIGCONT)
        killed.set()
        came(receiver, held[-1])
        settled()

    assert [one.event["data"]["id"] for one in receiver.deliveries] == [*jobs, held[0], *held]
    assert len({one.headers["webhook-id"] for one in receiver.about(held[0])}) == 1


def test_an_endpoint_is_called_by_its_name_unless_another_has_it_too(fleet: OpenAIFleet, receiver: Receiver) -> None:
    with endpoint(fleet, receiver) as one:
        assert call(fleet, f"/v1/webhook_endpoints/{one.name}").json()["id"] == one.id
        with endpoint(fleet, receiver):
            unclear = call(fleet, f"/v1/webhook_endpoints/{one.name}")
        assert unclear.status_code == 400
        assert f"{one.id} of tenant lab" in unclear.text
    gone = call(fleet, f"/v1/webhook_endpoints/{one.id}")
    assert (gone.status_code, "no webhook endpoint" in gone.text) == (404, True)
