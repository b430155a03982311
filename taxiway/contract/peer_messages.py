"""Frames between two fleets as messages of a WebSocket: small ones together, large ones in parts that small ones pass.

A frame that takes a line seconds would keep every other one waiting for as long. So a message is short, and what is
longer goes in parts, one after the other; between two parts go the frames that came meanwhile. Frames of one job keep
their order. No I/O.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import msgspec

from taxiway.contract.peers import PeerPart, encode_frames

MESSAGE = 2**16
"""Bytes of the longest message: a line of 1 MB/s carries it in 66 ms."""

MOST_READ = 2 * MESSAGE
"""Bytes of the longest message that is read."""

_HEADS = 2**6  # bytes of a message that are not in its frames: of the list, and of a part
_MOST_FRAMES = 2**16 - 1  # of a message

Frame = TypeVar("Frame")


class Outbox:
    """Frames to be sent on one connection. `small` and `large` are the bytes that wait, of short and of long frames."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._parted: deque[tuple[str, int, bytes]] = deque()
        self._keys: Counter[str] = Counter()
        self._at = 0  # bytes of the first in `_parted` that were sent
        self._put = self._sent = 0  # short frames
        self.small = self.large = 0

    def put(self, frame: bytes, key: str = "") -> None:
        """Add an encoded frame of a job; it comes behind those of the same job."""
        if len(frame) > MESSAGE // 2 or self._keys[key]:
            self._parted.append((key, self._put, frame))
            self._keys[key] += 1
            self.large += len(frame)
        else:
            self._frames.append(frame)
            self._put += 1
            self.small += len(frame)

    def messages(self) -> Iterator[bytes]:
        """Each message that is to be sent next, until nothing is left; frames may be added meanwhile."""
        while self._frames or self._parted:
            yield _list_of([*self._small(), *self._part()])

    def _small(self) -> Iterator[bytes]:
        """Frames for half a message, so that the other half is left to a part."""
        size = count = 0
        while self._frames and size + len(self._frames[0]) <= MESSAGE // 2 and count < _MOST_FRAMES - 1:
            frame = self._frames.popleft()
            size, count = size + len(frame), count + 1
            self._sent += 1
            self.small -= len(frame)
            yield frame

    def _part(self) -> Iterator[bytes]:
        """A part of the first long frame, once the short ones before it were sent: one may be of its job."""
        if not self._parted or self._sent < self._parted[0][1]:
            return
        key, _, frame = self._parted[0]
        content = memoryview(frame)[self._at : self._at + MESSAGE // 2 - _HEADS]
        self._at += len(content)
        self.large -= len(content)
        last = self._at == len(frame)
        if last:
            self._parted.popleft()
            self._keys -= Counter([key])
            self._at = 0
        yield encode_frames(PeerPart(content, last))


class Inbox(Generic[Frame]):
    """Frames in the messages of one connection.

    Args:
        read: the frames in a message.
        read_one: a frame, of one that came in parts.
        most: bytes of the longest frame.
    """

    def __init__(
        self, read: Callable[[bytes], list[Frame | PeerPart]], read_one: Callable[[bytearray], Frame], most: int
    ) -> None:
        self._read, self._read_one, self._most = read, read_one, most
        self._parts = bytearray()

    def frames(self, message: bytes) -> Iterator[Frame]:
        """The frames that a message completes. Raises one of `UNREADABLE`."""
        for frame in self._read(message):
            if not isinstance(frame, PeerPart):
                yield frame
                continue
            self._parts += frame.content
            if len(self._parts) > self._most:
                raise msgspec.ValidationError(f"a frame of more than {self._most} bytes")
            if frame.last:
                whole, self._parts = self._parts, bytearray()
                yield self._read_one(whole)


def _list_of(frames: list[bytes]) -> bytes:
    return b"".join((b"\xdc", len(frames).to_bytes(2, "big"), *frames))
