"""A worker's log on stderr: a constant event and its values, one line each."""

from __future__ import annotations

import logging
import sys

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "data"}

_PER_REQUEST = ("celery.worker.strategy", "celery.app.trace")
"""Celery's loggers that write an INFO line for every task."""


class EventFormatter(logging.Formatter):
    """`time level logger: event key=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with the record's `extra` values behind the event."""
        text = super().format(record)
        extra = " ".join(f"{name}={value!r}" for name, value in record.__dict__.items() if name not in _STANDARD)
        first, newline, rest = text.partition("\n")
        return f"{first} {extra}{newline}{rest}" if extra else text


def set_up_logging(level: str) -> None:
    """Send the root logger to stderr; what is per request shows at DEBUG only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EventFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level)
    for name in _PER_REQUEST:
        logging.getLogger(name).setLevel(level if level == "DEBUG" else "WARNING")
