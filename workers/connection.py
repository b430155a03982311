"""How a worker's threads reach Valkey or Redis: bounded in time, no hidden retries."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import hiredis
from redis import Redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError
from redis.retry import Retry

ANSWER = 5.0
"""Seconds within which a server must answer a worker: scripts over a whole batch of large results take some."""

_READ = 2**18
"""Bytes of an answer that are read at once: with redis-py's 64 KiB, a large one takes four times the processor time."""


class _Packer:
    """Packs commands in C: redis-py's looks at each argument in Python first, and copies what is large."""

    def pack(self, *args: Any) -> list[bytes]:
        """The bytes of a command; its name may be several words."""
        name, *rest = args
        return [hiredis.pack_command((*name.split(), *rest))]


def connect(url: str, *, answer: float | None = ANSWER) -> Redis:
    """A client of the server at `url`; nothing is sent yet. `answer` is None for commands that block."""
    return Redis.from_url(
        url,
        socket_timeout=answer,
        socket_connect_timeout=ANSWER,
        socket_read_size=_READ,
        command_packer=_Packer(),
        retry=Retry(NoBackoff(), 0),
    )


class Line:
    """A connection for the scripts that each burst of jobs runs: what a client does around one takes longer.

    Threads may share it. It connects with the first call, and anew once it was cut.
    """

    def __init__(self, url: str) -> None:
        self._connection: Any = connect(url).connection_pool.make_connection()  # redis-py's methods lack types
        self._turn = threading.Lock()

    def run(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """The answer of a script. Raises redis-py's errors."""
        call = ("EVALSHA", script.sha, len(keys), *keys, *args)
        with self._turn:
            self._look()
            try:
                return self._call(*call)
            except NoScriptError:
                self._call("SCRIPT LOAD", script.script)
                return self._call(*call)

    def _look(self) -> None:
        """Connect, anew where the server ended the connection."""
        try:
            ended = self._connection.can_read()
        except RedisConnectionError:
            ended = True
        if ended:
            self._connection.disconnect()

    def _call(self, *command: Any) -> Any:
        connection = self._connection
        connection.send_packed_command(connection.pack_command(*command), check_health=False)
        return connection.read_response()
