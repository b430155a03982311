"""The data of server-sent events, as engines stream their answers; the names of events are not used.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html, "Interpreting an event stream".
"""

from __future__ import annotations

import re

MAX_EVENT = 16 * 2**20
"""Bytes of one event; a server that sends more is at fault."""

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = "\ufeff".encode()


class EventTooLargeError(ValueError):
    """An event is over `MAX_EVENT`."""


class EventParser:
    """The data of each event, from a stream's chunks, however these are cut. Bytes that are not UTF-8 become U+FFFD."""

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._size = 0
        self._begun = False
        self._after_return = False
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of the events that end in this chunk.

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
        if self._size > MAX_EVENT:
            raise EventTooLargeError(f"expected an event of at most {MAX_EVENT} bytes")
        return events

    def _take(self, line: bytes) -> str | None:
        """Read one line; the data of the event that it ends."""
        if not self._begun:
            self._begun = True
            line = line.removeprefix(_BOM)
        if not line:
            return self._end()
        field, _, value = line.decode(errors="replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        return None

    def _end(self) -> str | None:
        data, self._data = self._data, []
        return "\n".join(data) if data else None
