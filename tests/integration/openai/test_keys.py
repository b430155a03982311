"""OpenAI's API at a router with keys: who may call, whose the jobs are, and how fast."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from api.access import Scope
from tests.keyring import authorized, keys_in, secret_of
from tests.openai_fleet import QUEUES, OpenAIFleet, openai_fleet
from tests.routing import HTTP, eventually

HELLO: Any = [{"role": "user", "content": "Hello"}]
BOTH: tuple[Scope, ...] = ("submit", "read")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIFleet]:
    folder: Path = tmp_path_factory.mktemp("keys")
    keys = keys_in(folder / "keys", lab=BOTH, shop=BOTH, reader=("read",), slow=BOTH, narrow=BOTH)
    queues = QUEUES + "tenants: {{slow: {{requests_per_second: 0.5}}, narrow: {{max_depth: 2}}}}\n"
    with openai_fleet(folder, [*keys, "--files", str(folder / "files")], queues, secret_of("lab")) as fleet:
        yield fleet


def client(fleet: OpenAIFleet, name: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=fleet.url, api_key=secret_of(name), **{"max_retries": 0, **options})


def test_an_unknown_key_and_one_without_the_scope_are_refused(fleet: OpenAIFleet) -> None:
    with client(fleet, "unknown") as wrong, pytest.raises(openai.AuthenticationError) as caught:
        wrong.models.list()
    assert caught.value.code == "invalid_api_key"
    with client(fleet, "reader") as reader, pytest.raises(openai.PermissionDeniedError):
        reader.chat.completions.create(model="talk", messages=HELLO)
    with client(fleet, "reader") as reader:
        assert reader.models.list().data


def test_the_key_is_the_tenant_whatever_the_user_says(fleet: OpenAIFleet) -> None:
    with client(fleet, "lab") as lab:
        job = lab.chat.completions.create(
            model="talk", messages=HELLO, user="shop", safety_identifier="shop"
        )._request_id

    def status(name: str) -> int:
        return HTTP.get(f"{fleet.router.http}/v2/jobs/{job}", headers=authorized(name)).status_code

    assert (status("lab"), status("shop")) == (200, 404)


def test_files_and_batches_of_another_tenant_do_not_exist(fleet: OpenAIFleet) -> None:
    body = {"model": "vector", "input": "a"}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": body}
    with client(fleet, "lab") as lab, client(fleet, "shop") as shop:
        file = lab.files.create(file=("l.jsonl", json.dumps(line).encode()), purpose="batch")
        asked: Any = {"endpoint": "/v1/embeddings", "completion_window": "24h", "input_file_id": file.id}
        batch = lab.batches.create(**asked)
        calls: list[Callable[[], Any]] = [
            lambda: shop.files.retrieve(file.id),
            lambda: shop.files.content(file.id),
            lambda: shop.files.delete(file.id),
            lambda: shop.batches.create(**asked),
            lambda: shop.batches.retrieve(batch.id),
            lambda: shop.batches.cancel(batch.id),
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError):
                call()
        assert file.id not in {one.id for one in shop.files.list().data}
        assert batch.id not in {one.id for one in shop.batches.list().data}
        done = eventually(lambda: [b for b in lab.batches.list().data if b.status == "completed"], within=30)
        with pytest.raises(openai.NotFoundError):
            shop.files.content(str(done[0].output_file_id))
        assert lab.files.content(str(done[0].output_file_id)).text.count("\n") == 1


def begun_by(one: openai.OpenAI, text: bytes) -> Any:
    """A call for a batch of these lines."""
    file = one.files.create(file=("lines.jsonl", text), purpose="batch")
    return {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}


def test_a_batch_with_more_lines_than_its_tenant_may_have_jobs_is_answered_line_by_line(fleet: OpenAIFleet) -> None:
    line = {"method": "POST", "url": "/v1/chat/completions", "body": {"model": "talk", "messages": HELLO}}
    text = "\n".join(json.dumps({**line, "custom_id": f"{n}"}) for n in range(80)).encode()
    with client(fleet, "narrow") as narrow:
        batch = narrow.batches.create(**begun_by(narrow, text))
        eventually(lambda: narrow.batches.retrieve(batch.id).status == "completed", within=10)
        counts = narrow.batches.retrieve(batch.id).request_counts
        assert counts is not None
        assert (counts.completed, counts.failed) == (80, 0)


def test_a_tenant_whose_batches_do_not_end_does_not_stop_those_of_another(fleet: OpenAIFleet) -> None:
    body = {"model": "talk", "messages": [{"role": "user", "content": "stall"}]}
    text = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()
    with client(fleet, "lab") as lab, client(fleet, "shop") as shop:
        asked, other = (begun_by(one, text) for one in (lab, shop))
        begun = [lab.batches.create(**asked) for _ in range(12)]
        eventually(lambda: [one for one in lab.batches.list().data if one.status == "in_progress"][7:])
        late = shop.batches.create(**other)
        eventually(lambda: shop.batches.retrieve(late.id).status == "in_progress")
        assert [one.status for one in lab.batches.list().data].count("validating") == 4
        for one in begun:
            lab.batches.cancel(one.id)
        shop.batches.cancel(late.id)
        eventually(lambda: {one.status for one in lab.batches.list(limit=12).data} == {"cancelled"}, within=30)
    jobs = HTTP.get(f"{fleet.router.http}/v2/jobs", headers=authorized("lab")).json()["jobs"]
    assert not [one for one in jobs if one["state"] in ("queued", "held", "running")]  # also not of one that gave way


def test_responses_of_another_tenant_do_not_exist(fleet: OpenAIFleet) -> None:
    with client(fleet, "lab") as lab, client(fleet, "shop") as shop, client(fleet, "reader") as reader:
        made = lab.responses.create(model="talk", input="Hello", background=True)
        calls: list[Callable[[], Any]] = [
            lambda: shop.responses.retrieve(made.id),
            lambda: shop.responses.cancel(made.id),
            lambda: shop.responses.delete(made.id),
            lambda: shop.responses.input_items.list(made.id),
            lambda: reader.responses.retrieve(made.id),
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError):
                call()
        with pytest.raises(openai.BadRequestError) as caught:
            shop.responses.create(model="talk", input="Go on", previous_response_id=made.id)
        assert caught.value.code == "previous_response_not_found"
        with pytest.raises(openai.PermissionDeniedError):
            reader.responses.create(model="talk", input="Hello")
        eventually(lambda: lab.responses.retrieve(made.id).status == "completed")
        assert lab.responses.retrieve(made.id).output_text == "Hello "


def test_a_rate_limit_is_in_openais_headers_and_the_sdk_waits_for_it(fleet: OpenAIFleet) -> None:
    with client(fleet, "slow") as slow:
        raw = slow.models.with_raw_response.list()
        assert raw.headers["x-ratelimit-limit-requests"] == "1"
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as caught:
            while True:  # a call that a busy machine made late is answered
                slow.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 2
    with client(fleet, "slow", max_retries=2) as patient:
        assert patient.models.list().data
