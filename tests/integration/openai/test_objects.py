"""Records of files, batches and responses on a real Valkey: what each tenant's take, and when they are deleted."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import redis

from api.storage.objects import FileRecord, Objects, Owned
from tasks.document import Size
from tasks.queues.limits import Limits
from tasks.settings import Settings
from taxiway.contract.keys import OBJECTS_EXPIRING, stored_key
from taxiway.errors import OverloadedError, RequestTooLargeError, UnknownObjectError
from tests.waiting import Blocking

LIMITS = Limits(
    file=Size(600), files=Size(1000), objects=Size(2000), responses=3, batches=2, keep_batch=50, keep_response=70
)


class Record(Owned):
    """An object with some text."""

    text: str


@contextmanager
def opened(settings: Settings, limits: Limits = LIMITS) -> Iterator[Any]:
    with asyncio.Runner() as runner:
        objects = Blocking(runner, Objects(settings.broker, limits))
        yield objects
        objects.close()


def file(name: str, size: int, **fields: Any) -> FileRecord:
    return FileRecord(
        id=name, tenant="lab", bytes=size, created_at=1, filename="lines.jsonl", purpose="batch", **fields
    )


def counts(settings: Settings) -> dict[str, int]:
    """What the tenant's objects take, without those that take nothing."""
    with redis.Redis.from_url(settings.broker) as client:
        found: Any = client.hgetall(stored_key("lab"))
    return {name.decode(): int(size) for name, size in found.items() if int(size)}


def test_the_files_of_a_tenant_have_as_many_bytes_as_the_limit(settings: Settings) -> None:
    with opened(settings) as objects:
        objects.add_file(file("a", 600), 1.0)
        with pytest.raises(RequestTooLargeError, match=r"limit 1000, limits\.files") as caught:
            objects.add_file(file("b", 401), 2.0)
        assert (caught.value.status, objects.room("lab")) == (413, 400)
        with pytest.raises(UnknownObjectError):
            objects.get("file", "b", "lab")
        objects.add_file(file("answers", 5000), 3.0, limited=False)  # of work that is done: it is kept
        with pytest.raises(RequestTooLargeError, match="have 5600 bytes"):
            objects.room("lab")
        objects.delete("file", "answers", "lab", 5000)
        objects.delete("file", "a", "lab", 600)
        objects.delete("file", "a", "lab", 600)  # as two routers do
    assert counts(settings) == {}


def test_the_records_of_a_tenant_have_as_many_bytes_as_the_limit_and_others_are_not_counted(settings: Settings) -> None:
    with opened(settings) as objects:
        objects.add_batch("one", "lab", Record("lab", "x" * 1500), 1.0)
        for _ in range(2):
            with pytest.raises(RequestTooLargeError, match=r"limits\.objects"):
                objects.add_batch("two", "lab", Record("lab", "x" * 500), 2.0)
        objects.add_batch("two", "shop", Record("shop", "x" * 500), 2.0)
        objects.change("batch", "one", "lab", lambda _: Record("lab", ""))
        objects.add_batch("three", "lab", Record("lab", "x" * 500), 3.0)
        objects.keep_response("four", "lab", Record("lab", "x" * 1500), 4.0, opened=False)
    size = len(msgspec.json.encode(Record("lab", "")))
    assert counts(settings) == {"objects": 2 * size + 500, "responses": size + 1500}


def test_a_tenant_has_so_many_open_batches_and_the_oldest_come_first(settings: Settings) -> None:
    with opened(settings) as objects:
        for place, name in enumerate(("b", "a")):
            objects.add_batch(name, "lab", Record("lab", ""), float(place))
        with pytest.raises(OverloadedError, match=r"limit 2, limits\.batches") as caught:
            objects.add_batch("c", "lab", Record("lab", ""), 2.0)
        assert (caught.value.status, caught.value.details["tenant"]) == (429, "lab")
        assert objects.open_batches() == [("b", "lab"), ("a", "lab")]
        objects.close_batch("b", "lab", 100.0)
        objects.add_batch("c", "lab", Record("lab", ""), 2.0)
        assert objects.expired(149.0, 9) == []
        assert objects.expired(150.0, 9) == [("batch", "b")]  # after `keep_batch`
        objects.delete("batch", "b", "lab")
        assert objects.expired(150.0, 9) == []


def test_the_latest_responses_are_kept_in_the_bytes_of_the_limit_until_they_expire(settings: Settings) -> None:
    def kept(objects: Any) -> list[bytes]:
        return list((objects.page("response", "lab", after="", most=9, latest_first=False))[0])

    with opened(settings) as objects:
        for number in range(5):
            objects.keep_response(f"r{number}", "lab", Record("lab", f"{number}"), number, opened=False)
        assert [msgspec.json.decode(one)["text"] for one in kept(objects)] == ["2", "3", "4"]
        objects.use_responses(["r2"], "lab", 10.0, most=1000)
        objects.keep_response("large", "lab", Record("lab", "x" * 1900), 11.0, opened=False)
        assert [len(one) > 1900 for one in kept(objects)] == [False, False, True]
        objects.keep_response("larger", "lab", Record("lab", "x" * 3000), 12.0, opened=False)
        assert [len(one) > 3000 for one in kept(objects)] == [True]
        assert objects.expired(81.0, 9) == []
        assert objects.expired(82.0, 9) == [("response", "larger")]
    assert list(counts(settings)) == ["responses"]


def test_a_page_of_large_records_ends_early_and_the_next_one_goes_on(settings: Settings) -> None:
    with opened(settings, msgspec.structs.replace(LIMITS, objects=Size(2**30), responses=100)) as objects:
        for number in range(40):
            objects.keep_response(f"r{number}", "lab", Record("lab", "x" * 2**17), number, opened=False)
        found, more = objects.page("response", "lab", after="", most=40, latest_first=False)
        assert (len(found), more) == (32, True)  # 4 MiB
        rest, more = objects.page("response", "lab", after="r31", most=40, latest_first=False)
        assert (len(rest), more) == (8, False)
        latest, more = objects.page("response", "lab", after="", most=7, latest_first=True)
        assert (latest, more) == ([*reversed(rest)][:7], True)


def test_a_content_without_a_record_is_named_once_its_upload_cannot_run_any_more(settings: Settings) -> None:
    with opened(settings) as objects:
        objects.expect_content("broken", 0.0)
        objects.expect_content("whole", 0.0)
        objects.add_file(file("whole", 1), 1.0)
        assert objects.expired(6 * 3600 - 1, 9) == []
        assert objects.expired(6 * 3600, 9) == [("file", "broken")]
        objects.forget("file", "broken")
    with redis.Redis.from_url(settings.broker) as client:
        assert client.zcard(OBJECTS_EXPIRING) == 0
