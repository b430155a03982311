"""The benchmarks' HTTP client against a server of its own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from benchmarks.suite.http_caller import HttpCaller


@asynccontextmanager
async def server(answers: Sequence[bytes], asked: list[bytes]) -> AsyncIterator[int]:
    """The port of a server that answers every request with these pieces, until its client closes."""
    served: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            asked.append(b"connection")
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                asked.append(await reader.readexactly(length))
                for piece in answers:
                    writer.write(piece)
                    await asyncio.sleep(0.001)

    async with await asyncio.start_server(
        lambda reader, writer: served.add(asyncio.create_task(serve(reader, writer))), "127.0.0.1", 0
    ) as listening:
        yield listening.sockets[0].getsockname()[1]
        await asyncio.gather(*served)


def caller(port: int, *bodies: bytes) -> HttpCaller:
    return HttpCaller(port=port, path="/", bodies=bodies, kind="text/plain", count=len)


async def test_the_caller_reads_each_answer_whole_and_uses_connections_again() -> None:
    pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", b"cde"]
    asked: list[bytes] = []

    async with server(pieces, asked) as port, caller(port, b"one", b"two") as asking:
        assert [await asking.body(number) for number in range(3)] == [b"abcde"] * 3
    assert asked == [b"connection", b"one", b"two", b"one"]


async def test_an_answer_that_is_no_success_is_a_failure() -> None:
    refusal = [b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"]

    with pytest.raises(ValueError, match="429"):
        async with server(refusal, []) as port, caller(port, b"") as asking:
            await asking.ask(0)
