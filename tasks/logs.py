"""A process's log: one JSON object a line on stderr, a constant event with its values beside it; never a secret."""

from __future__ import annotations

import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_PER_REQUEST = ("httpx", "uvicorn", "celery.worker.strategy", "celery.app.trace")
"""Loggers of libraries that write an INFO line for every request, task or start."""


_SECRETS = re.compile(r"(?<=://)[^/@\s\"]*(?=@)|(?<=\btaxiway_)[\w-]{43}(?![\w-])|(?<=\b[Bb]earer )[^\s\",]+")
"""Names and passwords in addresses, and keys of the HTTP door."""


def redacted(text: str) -> str:
    """`text` without secrets: a library's error text may contain any."""
    return _SECRETS.sub("…", text)


class JsonLines(logging.Formatter):
    """Writes a record as `{"time", "level", "logger", "event", …}`, its `extra` values in the same object."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON; values that JSON cannot hold are written as text."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return redacted(_encoded(line))


def _encoded(line: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(line, enc_hook=str).decode()
    except (ValueError, TypeError, RecursionError):  # text with lone surrogates, for one: what others sent
        return msgspec.json.encode({name: ascii(value) for name, value in line.items()}).decode()


def log_to_stderr(level: str = "INFO") -> None:
    """Send the process's log to stderr as `JsonLines`; what others log for each request shows at DEBUG only.

    Raises:
        ValueError: no level of that name.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _PER_REQUEST:
        logging.getLogger(name).setLevel(level if level == "DEBUG" else "WARNING")
