"""A worker's name, which one live process has at a time: claims, heartbeats and remote control address it."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import sys
import time

from broker.valkey.worker_store import WorkerStore
from tasks.heartbeat import GONE_AFTER
from taxiway.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)

NAME_TAKEN = 4
"""Exit status of a worker whose name another live process has."""

_NAME_POLL = 0.25  # seconds between two looks at a name that is taken
_LAST_WORDS = 1  # commands that may still be on their way to the store when their process has been killed


def worker_name(chosen: str, default: str) -> str:
    """The full name of a worker: as in Celery, a name without a host gets this machine's."""
    name = chosen or default
    return name if "@" in name else f"{name}@{socket.gethostname()}"


class WorkerName:
    """One process's hold on its worker's name."""

    def __init__(self, store: WorkerStore) -> None:
        self._store = store
        self._left, self._prolonged = math.inf, 0  # seconds that the name is another's, and how often they became more
        self._process = f"process {os.getpid()} on {socket.gethostname()} ({secrets.token_hex(4)})"

    def take(self) -> None:
        """Take the name. That of a process that was killed is free after `GONE_AFTER` seconds, which this waits for.

        While the store is unavailable the name counts as free; `keep` looks again.

        Raises:
            SystemExit: another live process has it.
        """
        said = False
        while holder := self._other():
            if self._lives:
                sys.stderr.write(f"the worker name {self._store.worker!r} is taken by {holder}\nhint: {_HINT}\n")
                raise SystemExit(NAME_TAKEN)
            if not said:
                logger.info("waiting for the worker's name", extra={"worker": self._store.worker, "holder": holder})
            said = True
            time.sleep(min(_NAME_POLL, self._left))

    def keep(self) -> None:
        """Keep the name; the process exits if another live one has taken it, because this one was silent for long."""
        holder = self._other()
        if holder and self._lives:
            logger.critical("worker name lost; worker exits", extra={"worker": self._store.worker, "holder": holder})
            os._exit(NAME_TAKEN)

    def leave(self) -> None:
        """Let another process have the name at once."""
        self._store.hold_name(self._process, 0.0)

    @property
    def _lives(self) -> bool:
        """Whether the other process that has the name is alive, and not only what a store remembers of it."""
        return self._prolonged > _LAST_WORDS

    def _other(self) -> str:
        """The other process that has the name; empty if this one has it now."""
        try:
            holder, left = self._store.hold_name(self._process, GONE_AFTER)
        except BrokerUnavailableError:
            return ""
        if holder == self._process:
            self._left, self._prolonged = math.inf, 0
            return ""
        self._prolonged += left > self._left
        self._left = left
        return holder


_HINT = (
    "a device has one worker; to run this one beside it, give it a name of its own: "
    "--name NAME, or -n NAME@%h of `celery worker`"
)
