"""Contents of files: in a folder, and by obstore, here at the address of a folder."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from api.storage.objects import Contents, FolderContents, open_contents

pytest.importorskip("obstore", reason="obstore is not installed: the group object-store")


@pytest.fixture(params=["folder", "store"])
def contents(request: pytest.FixtureRequest, tmp_path: Path) -> Contents:
    return open_contents(str(tmp_path) if request.param == "folder" else tmp_path.as_uri())


async def pieces(*given: bytes | Exception) -> AsyncIterator[bytes]:
    for one in given:
        if isinstance(one, Exception):
            raise one
        yield one


async def read(contents: Contents, name: str) -> bytes:
    return b"".join([piece async for piece in contents.read(name)])


async def test_a_content_is_read_as_it_was_written(contents: Contents) -> None:
    assert await contents.write("a/b", pieces(b"x" * 2**20, b"", b"yz")) == 2**20 + 2
    assert await read(contents, "a/b") == b"x" * 2**20 + b"yz"
    assert await contents.write("a/b", pieces()) == 0
    assert await read(contents, "a/b") == b""
    await contents.delete("a/b", "a/none")
    with pytest.raises(FileNotFoundError):
        await read(contents, "a/b")


async def test_a_content_that_breaks_off_is_not_there(contents: Contents, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="gone"):
        await contents.write("c", pieces(b"x", ValueError("gone")))
    with pytest.raises(FileNotFoundError):
        await read(contents, "c")
    assert not isinstance(contents, FolderContents) or [*tmp_path.iterdir()] == []


async def test_a_folder_is_deleted_with_all_that_is_in_it(contents: Contents) -> None:
    for name in ("d/1", "d/2", "e/1"):
        await contents.write(name, pieces(b"x"))
    await contents.delete_below("d/")
    with pytest.raises(FileNotFoundError):
        await read(contents, "d/1")
    assert await read(contents, "e/1") == b"x"


def test_what_a_killed_router_left_unfinished_is_deleted_after_an_hour(tmp_path: Path) -> None:
    contents, hour = FolderContents(tmp_path), time.time() - 3601
    for name, age in (
        ("files/a.1.part", hour),
        ("files/b.2.part", None),
        ("files/c", hour),
        ("batches/x/d.part", hour),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        if age is not None:
            os.utime(path, (age, age))

    asyncio.run(contents.delete_unfinished())
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"b.2.part", "c"}
