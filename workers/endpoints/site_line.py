"""The WebSocket to another fleet: opened here, opened again when it is lost, and silent for at most `STALE` seconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from socket import IPPROTO_TCP, TCP_NOTSENT_LOWAT

import aiohttp

from taxiway.contract.peers import (
    BESIDE,
    MESSAGE,
    STALE,
    Inbox,
    Outbox,
    PeerHello,
    ToCaller,
    ToSite,
    encode_frames,
    read_one_to_caller,
    read_to_caller,
)
from taxiway.errors import UNREADABLE, cut
from workers.endpoints.protocol import MAX_ANSWER, EndpointError

AGAIN = 0.5
"""Seconds between two attempts to connect."""

_SHOWN = 100  # characters of what the other side says


class BrokenProtocolError(Exception):
    """What the other fleet sends is not what was agreed."""


@dataclass(slots=True, eq=False)
class SiteLine:
    """Carries frames both ways. For one event loop. `greet` and `take` raise `BrokenProtocolError` to end it."""

    hello: PeerHello
    """What is said first on each connection."""
    greet: Callable[[ToCaller], None]
    """Takes in the first frame of each connection, and may say more."""
    take: Callable[[ToCaller], None]
    """Takes in all frames after it."""
    lost: Callable[[str, bool], None]
    """Called with why there is no line, and whether the other fleet broke the protocol."""
    most: int = BESIDE
    """Bytes of the largest frame that the other side reads."""
    _out: Outbox = field(default_factory=Outbox)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def waiting(self) -> int:
        """Bytes of large frames that are not sent yet."""
        return self._out.large

    def say(self, frame: ToSite) -> None:
        """Send a frame; without a line it is lost."""
        self._out.put(encode_frames(frame), getattr(frame, "key", ""))
        self._news.set()

    async def stay(
        self,
        connect: Callable[[], Awaitable[aiohttp.ClientWebSocketResponse]],
        fault: Callable[[Exception], EndpointError],
    ) -> None:
        """Connect again whenever the connection is lost. `fault` says what a failure of the connection means."""
        while True:
            try:
                async with await connect() as socket:
                    self.lost(await self._converse(socket), False)
            except EndpointError as error:
                self.lost(error.reason, False)
            except aiohttp.WSServerHandshakeError as error:
                self.lost(f"it refuses the connection: {error.status}", False)
            except BrokenProtocolError as error:
                self.lost(f"it broke the protocol: {error}", True)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self.lost(fault(error).reason, False)
            await asyncio.sleep(AGAIN)

    async def _converse(self, socket: aiohttp.ClientWebSocketResponse) -> str:
        """Speak until the connection ends; returns why it did."""
        self._out, self.most = Outbox(), BESIDE
        inbox = Inbox(read_to_caller, read_one_to_caller, MAX_ANSWER)
        bound_unsent(socket)
        self.say(self.hello)
        take = self.greet
        writing = asyncio.create_task(self._write(socket))
        try:
            while True:
                message = await socket.receive(timeout=STALE)
                if message.type is not aiohttp.WSMsgType.BINARY:
                    why = cut(str(message.extra or message.data or ""), _SHOWN)
                    return f"it closed the connection: {why}" if why else "it closed the connection"
                for frame in _frames(inbox, message.data):
                    take(frame)
                    take = self.take
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError):  # who reads learns why
            while True:
                await self._news.wait()
                self._news.clear()
                for message in self._out.messages():
                    await socket.send_bytes(message)


def bound_unsent(socket: aiohttp.ClientWebSocketResponse) -> None:
    """Have the kernel keep no more than a message unsent: a small frame would wait behind it."""
    if (wire := socket.get_extra_info("socket")) is not None:
        wire.setsockopt(IPPROTO_TCP, TCP_NOTSENT_LOWAT, MESSAGE)


def _frames(inbox: Inbox[ToCaller], message: bytes) -> Iterator[ToCaller]:
    try:
        yield from inbox.frames(message)
    except UNREADABLE as error:
        raise BrokenProtocolError(cut(str(error), _SHOWN)) from error
