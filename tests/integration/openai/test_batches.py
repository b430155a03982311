"""OpenAI's files and batches by the stock SDK: uploads, lines that are jobs, and routers that are killed meanwhile."""

import io
import json
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import redis
from openai.types import Batch, FileObject

from api.objects.batches import PART
from taxiway.contract.keys import OBJECTS_EXPIRING
from tests.openai_fleet import QUEUES, OpenAIFleet, openai_fleet, sdk
from tests.routing import HTTP, eventually, router_process


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[OpenAIFleet]:
    queues = QUEUES.replace("limits: {{", "limits: {{file: 1MiB, ")
    with openai_fleet(tmp_path_factory.mktemp("batches"), ["--files", str(files)], queues) as fleet:
        yield fleet


def line(number: int, text: str, endpoint: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    body = {"model": "talk", "messages": [{"role": "user", "content": text}], **fields}
    return {"custom_id": f"line-{number}", "method": "POST", "url": endpoint, "body": body}


def upload(client: openai.OpenAI, lines: list[Any]) -> FileObject:
    content = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    return client.files.create(file=("lines.jsonl", content.encode()), purpose="batch")


def begin(
    client: openai.OpenAI, lines: list[Any], endpoint: Any = "/v1/chat/completions", window: Any = "24h"
) -> Batch:
    return client.batches.create(
        input_file_id=upload(client, lines).id, endpoint=endpoint, completion_window=window, metadata={"for": "tests"}
    )


def ended(client: openai.OpenAI, batch: str, within: float = 120) -> Batch:
    def look() -> Batch | None:
        found = client.batches.retrieve(batch)
        return found if found.status in ("completed", "failed", "expired", "cancelled") else None

    found: Batch = eventually(look, within=within)
    return found


def lines_of(client: openai.OpenAI, file: str | None) -> list[dict[str, Any]]:
    return [] if file is None else [json.loads(line) for line in client.files.content(file).text.splitlines()]


def test_a_file_is_kept_listed_and_deleted(client: openai.OpenAI, files: Path) -> None:
    content = b"a line\n" * 1000
    made = client.files.create(file=("notes.txt", io.BytesIO(content)), purpose="user_data")

    assert (made.bytes, made.filename, made.purpose, made.status) == (7000, "notes.txt", "user_data", "processed")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == content
    assert made.id in [one.id for one in client.files.list()]
    assert made.id in [one.id for one in client.files.list(limit=1)]  # the SDK reads on, page by page
    later = client.files.create(file=("notes.txt", b"x"), purpose="vision")
    assert {one.purpose for one in client.files.list(purpose="user_data", limit=1)} == {"user_data"}
    assert [one.id for one in client.files.list(purpose="vision")] == [later.id]
    client.files.delete(later.id)
    assert (files / "files" / made.id).read_bytes() == content
    assert client.files.delete(made.id).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)
    assert not (files / "files" / made.id).exists()


EXPIRES_WRONG: list[tuple[Any, str]] = [
    ({"anchor": "created_at", "seconds": 0}, "expires_after.seconds"),
    ({"anchor": "now", "seconds": 60}, "expires_after.anchor"),
    ({"seconds": 60}, "expires_after.anchor"),
]


def test_a_file_expires_when_it_is_to(client: openai.OpenAI, files: Path) -> None:
    given: Any = {"file": ("notes.txt", b"x"), "purpose": "user_data"}
    made: Any = client.files.create(**given, expires_after={"anchor": "created_at", "seconds": 2})
    assert made.expires_at == made.created_at + 2
    eventually(lambda: not (files / "files" / made.id).exists())
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert made.id not in [one.id for one in client.files.list()]
    for after, where in EXPIRES_WRONG:
        with pytest.raises(openai.BadRequestError) as caught:
            client.files.create(**given, expires_after=after)
        assert caught.value.param == where


def test_an_upload_over_the_limit_and_one_without_a_purpose_leave_nothing(
    client: openai.OpenAI, fleet: OpenAIFleet, files: Path
) -> None:
    before = sorted(files.rglob("*"))
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("large", bytes(2**20 + 1)), purpose="batch")
    assert caught.value.status_code == 413
    url = f"{fleet.url}/files"
    forms: list[dict[str, Any]] = [{"files": {"file": b"x"}}, {"data": {"purpose": "batch"}}, {"content": b"nothing"}]
    for form in forms:
        answer = HTTP.post(url, **form)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert [path for path in sorted(files.rglob("*")) if path.is_file()] == [path for path in before if path.is_file()]


def test_an_upload_whose_client_leaves_leaves_nothing(fleet: OpenAIFleet, files: Path) -> None:
    before = contents_in(files)
    head = b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
    form = head % (b"file", b'; filename="x"') + bytes(100_000) + b"\r\n" + head % (b"purpose", b"") + b"bat"
    host, port = fleet.router.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        length = len(form) + 1000
        client.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=B\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (length, form)
        )
        whole = {".part"}.isdisjoint  # its content is, its form is not
        eventually(lambda: (made := contents_in(files) - before) and whole(path.suffix for path in made))
    eventually(lambda: contents_in(files) == before)


def test_a_content_whose_router_was_killed_before_it_had_a_record_is_deleted(fleet: OpenAIFleet, files: Path) -> None:
    content = files / "files" / "file-broken"
    content.parent.mkdir(exist_ok=True)
    content.write_bytes(b"x")
    with redis.Redis.from_url(fleet.settings.broker) as store:
        store.zadd(OBJECTS_EXPIRING, {"file:file-broken": 1})  # as its upload announced
        eventually(lambda: not content.exists())
        eventually(lambda: store.zscore(OBJECTS_EXPIRING, "file:file-broken") is None)


def test_a_router_that_cannot_write_files_says_so(fleet: OpenAIFleet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with router_process(fleet.settings, options=["--files", str(tmp_path / "file")]) as router:
        eventually(lambda: ready(router.http))
        with sdk(f"{router.http}/v1") as client, pytest.raises(openai.InternalServerError) as caught:
            upload(client, [line(1, "x")])
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")


def test_a_batch_answers_each_line_once_under_its_custom_id(client: openai.OpenAI) -> None:
    batch = begin(client, [line(number, f"Hello {number}") for number in range(30)])
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"for": "tests"})
    done = ended(client, batch.id)

    counts = done.request_counts
    assert counts is not None
    assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 30, 30, 0)
    assert done.error_file_id is None
    written = lines_of(client, done.output_file_id)
    said = {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in written}
    assert said == {f"line-{number}": f"Hello {number} " for number in range(30)}
    assert len(written) == 30
    assert {one["response"]["body"]["service_tier"] for one in written} == {"flex"}
    assert done.id in [one.id for one in client.batches.list()]

    assert client.delete(f"/batches/{done.id}", cast_to=dict[str, Any])["deleted"]
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve(done.id)
    assert lines_of(client, done.output_file_id) == written


def test_a_batch_of_embeddings_and_lines_that_fail(client: openai.OpenAI) -> None:
    lines = [
        {**line(number, ""), "url": "/v1/embeddings", "body": {"model": "vector", "input": ["a", "bb"]}}
        for number in range(3)
    ]
    done = ended(client, begin(client, lines, "/v1/embeddings").id)
    assert [len(one["response"]["body"]["data"]) for one in lines_of(client, done.output_file_id)] == [2, 2, 2]

    faults = [line(2, "status=400 no such tool"), line(3, "status=500 worn out")]
    done = ended(client, begin(client, [line(1, "fine"), *faults]).id)
    assert done.request_counts is not None
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 2)
    answers = {one["custom_id"]: one["response"] for one in lines_of(client, done.error_file_id)}
    assert {name: answer["status_code"] for name, answer in answers.items()} == {"line-2": 400, "line-3": 503}
    assert "no such tool" in answers["line-2"]["body"]["error"]["message"]
    assert answers["line-3"]["body"]["error"]["code"] == "device_fault"
    assert answers["line-3"]["request_id"]


def test_wrong_lines_fail_the_batch_with_their_numbers(client: openai.OpenAI) -> None:
    wrong = [line(1, "fine"), "", "{", line(1, "again"), line(3, "x", "/v1/embeddings"), line(4, "x", model="tlak")]
    wrong += [line(5, "x", stream=True), line(6, "x", temperature=9)]
    done = ended(client, begin(client, wrong).id)

    assert done.status == "failed"
    assert done.errors is not None and done.errors.data is not None
    assert [(one.line, one.code) for one in done.errors.data] == [
        (3, "invalid_value"),
        (4, "duplicate_custom_id"),
        (5, "invalid_value"),
        (6, "model_not_found"),
        (7, "unsupported_parameter"),
        (8, "invalid_value"),
    ]
    assert ended(client, begin(client, [""]).id).status == "failed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"metadata": {"a": "x" * 513}}, "metadata[...]"),
        ({"metadata": {"a" * 65: "x"}}, "metadata"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(client: openai.OpenAI, fields: dict[str, Any], param: str | None) -> None:
    asked: Any = {"input_file_id": upload(client, [line(1, "x")]).id, "endpoint": "/v1/chat/completions"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(**{"completion_window": "24h", **asked, **fields})
    assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-none", endpoint="/v1/embeddings", completion_window="24h")


def test_a_cancelled_batch_keeps_what_is_answered_and_ends_its_jobs(client: openai.OpenAI, fleet: OpenAIFleet) -> None:
    batch = begin(client, [line(1, "first"), *(line(n, f"cancelled {n} stall") for n in range(2, 9))])
    eventually(lambda: fleet.engine.running == 4)
    with pytest.raises(openai.BadRequestError) as caught:
        client.delete(f"/batches/{batch.id}", cast_to=dict[str, Any])
    assert (caught.value.param, "cancel it first" in caught.value.message) == ("batch_id", True)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch.id)

    assert (done.status, [one["custom_id"] for one in lines_of(client, done.output_file_id)]) == (
        "cancelled",
        ["line-1"],
    )
    eventually(lambda: fleet.engine.running == 0)
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_what_is_not_answered_within_the_window_expires_and_the_rest_is_kept(client: openai.OpenAI) -> None:
    done = ended(client, begin(client, [line(1, "early"), line(2, "late stall")], window="5s").id)

    assert (done.status, [one["custom_id"] for one in lines_of(client, done.output_file_id)]) == ("expired", ["line-1"])
    (late,) = lines_of(client, done.error_file_id)
    assert (late["custom_id"], late["response"], late["error"]["code"]) == ("line-2", None, "batch_expired")


LINES = 150


def test_what_routers_begin_is_finished_by_others_and_no_line_is_lost_or_answered_twice(
    fleet: OpenAIFleet, client: openai.OpenAI, files: Path
) -> None:
    """Routers that work on a batch are killed, three times."""
    before = Counter(prompt_of(chat) for chat in fleet.engine.chats)
    options = ["--files", str(files)]
    # the module's own router must not work on it: it is paused while others do
    fleet.router.process.send_signal(signal.SIGSTOP)
    try:
        batch = None
        for turn in range(3):
            with router_process(fleet.settings, options=options) as router:
                eventually(lambda: ready(router.http))
                with sdk(f"{router.http}/v1") as other:
                    if batch is None:
                        batch = begin(other, [line(n, f"wait=0.05 survivor {n} said") for n in range(LINES)]).id
                    eventually(partial(begun, fleet, LINES // 5 * (turn + 1)))
                    router.process.kill()
        assert batch is not None
    finally:
        fleet.router.process.send_signal(signal.SIGCONT)
    done = ended(client, batch, within=120)

    assert done.request_counts is not None
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", LINES, 0)
    written = [one["custom_id"] for one in lines_of(client, done.output_file_id)]
    assert written == [f"line-{number}" for number in range(LINES)]
    asked = Counter(prompt_of(chat) for chat in fleet.engine.chats) - before
    assert sum(count for prompt, count in asked.items() if "survivor" in prompt) == LINES


def test_a_batch_whose_input_was_deleted_fails_with_the_answers_that_it_has(
    fleet: OpenAIFleet, client: openai.OpenAI, files: Path
) -> None:
    """Its router stops once all lines but the last are written; another one goes on, and finds no input."""
    lines = [line(n, f"Hello {n}") for n in range(PART)] + [line(n, f"late {n} stall") for n in range(PART, PART + 4)]
    fleet.router.process.send_signal(signal.SIGSTOP)
    try:
        with router_process(fleet.settings, options=["--files", str(files)]) as router:
            eventually(lambda: ready(router.http))
            with sdk(f"{router.http}/v1") as other:
                batch = begin(other, lines)
                eventually(lambda: completed_in(other, batch.id) == PART, within=60)
                other.files.delete(batch.input_file_id)
    finally:
        fleet.router.process.send_signal(signal.SIGCONT)
    done = ended(client, batch.id)

    assert done.errors is not None and done.errors.data is not None and done.request_counts is not None
    assert (done.status, [one.code for one in done.errors.data]) == ("failed", ["invalid_file"])
    assert (done.request_counts.total, done.request_counts.completed) == (PART + 4, PART)
    assert len(lines_of(client, done.output_file_id)) == PART
    assert not (files / "batches" / batch.id).exists()


def completed_in(client: openai.OpenAI, batch: str) -> int:
    counts = client.batches.retrieve(batch).request_counts
    return 0 if counts is None else counts.completed


def prompt_of(chat: dict[str, Any]) -> str:
    return str(chat["messages"][-1]["content"])


def begun(fleet: OpenAIFleet, most: int) -> bool:
    """Whether the engine was asked for so many of the lines."""
    return sum("survivor" in prompt_of(chat) for chat in fleet.engine.chats) >= most


def contents_in(files: Path) -> set[Path]:
    return {path for path in files.rglob("*") if path.is_file()}


def ready(http: str) -> bool:
    return HTTP.get(f"{http}/v2/models/talk/ready").is_success
