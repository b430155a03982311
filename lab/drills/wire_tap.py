"""Records every byte on a line, both ways, and reads what its WebSockets carried: clients mask what they send."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np

from tests.cable import Cable

_HEAD_ENDS = b"\r\n\r\n"
_UPGRADES = b"upgrade: websocket"


class WireTap(Cable):
    """A line to `(host, port)` that keeps a copy of what it carries."""

    def __init__(self, host: str, port: int) -> None:
        self._recorded: dict[socket.socket, bytearray] = {}
        super().__init__(host, port)

    @property
    def size(self) -> int:
        """Bytes that were carried."""
        return sum(map(len, self._recorded.values()))

    def contents(self) -> Iterator[bytes]:
        """The bytes of each connection and direction as they were, and what the WebSockets among them carried."""
        for recorded in list(self._recorded.values()):
            raw = bytes(recorded)
            yield raw
            head, _, frames = raw.partition(_HEAD_ENDS)
            if _UPGRADES in head.lower():
                yield b"".join(payloads(frames))

    def _taken(self, source: socket.socket, chunk: bytes) -> None:
        self._recorded.setdefault(source, bytearray()).extend(chunk)


def payloads(frames: bytes) -> Iterator[bytes]:
    """What WebSocket frames carry (RFC 6455, 5.2), up to where they were cut."""
    at = 0
    while at + 2 <= len(frames):
        masked, size = frames[at + 1] >> 7, frames[at + 1] & 127
        at += 2
        if size > 125:
            wide = 2 if size == 126 else 8
            size, at = int.from_bytes(frames[at : at + wide], "big"), at + wide
        mask, at = frames[at : at + 4 * masked], at + 4 * masked
        payload = frames[at : at + size]
        at += size
        if len(mask) == 4 and payload:
            keys = np.resize(np.frombuffer(mask, np.uint8), len(payload))
            payload = (np.frombuffer(payload, np.uint8) ^ keys).tobytes()
        yield payload
