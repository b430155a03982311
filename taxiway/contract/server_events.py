"""Server-sent events, as routers and engines stream their answers.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html, "Interpreting an event stream".
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_EVENT = 16 * 2**20
"""Bytes of one event; an engine that sends more is at fault."""

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = "\ufeff".encode()


class EventTooLargeError(ValueError):
    """An event is over its bound."""


class ServerEvent(NamedTuple):
    """One event; `kind` and `id` are empty unless it has its own."""

    kind: str
    id: str
    data: str


class EventParser:
    """The events in a stream's chunks, however these are cut. Bytes that are not UTF-8 become U+FFFD.

    `most` bounds the bytes of one event.
    """

    def __init__(self, most: int = MAX_EVENT) -> None:
        self._most = most
        self._line: list[bytes] = []
        self._size = 0
        self._begun = False
        self._after_return = False
        self._data: list[str] = []
        self._named: dict[str, str] = {}

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that end in this chunk.

        Raises:
            EventTooLargeError: an event is over the bound.
        """
        if self._after_return and chunk:
            chunk = chunk.removeprefix(b"\n")  # the second half of a line end that was cut
            self._after_return = False
        self._size += len(chunk)
        *ended, rest = _LINE_END.split(chunk)
        events = []
        for end in ended:
            line = b"".join((*self._line, end))
            self._line = []
            if (event := self._take(line)) is not None:
                events.append(event)
                self._size = len(chunk)
        self._line.append(rest)
        self._after_return = chunk.endswith(b"\r")
        if self._size > self._most:
            raise EventTooLargeError(f"expected an event of at most {self._most} bytes")
        return events

    def _take(self, line: bytes) -> ServerEvent | None:
        """Read one line; the event that it ends."""
        if not self._begun:
            self._begun = True
            line = line.removeprefix(_BOM)
        if not line:
            return self._end()
        field, _, value = line.decode(errors="replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field in ("event", "id"):
            self._named[field] = value
        return None

    def _end(self) -> ServerEvent | None:
        data, self._data, named, self._named = self._data, [], self._named, {}
        return ServerEvent(named.get("event", ""), named.get("id", ""), "\n".join(data)) if data else None
