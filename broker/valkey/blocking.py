"""How a worker's threads reach Valkey or Redis: bounded in time, no hidden retries."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import Any, TypeVar

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.retry import Retry

from broker.valkey.lua import Call, script
from taxiway.contract.blobs import Buffer
from taxiway.valkey.resp import END, READ, Value, packed

ANSWER = 5.0
"""Seconds within which a server must answer a worker: scripts over a whole batch of large results take some."""

_NOTHING = (b"_", b"$-1")  # how RESP3 and RESP2 say that there is no value

Received = TypeVar("Received", bytes, int)


class _Packer:
    """Packs commands in C: redis-py's looks at each argument in Python first, and copies what is large."""

    def pack(self, *args: Any) -> list[Buffer]:
        """The bytes of a command; its name may be several words."""
        name, *rest = args
        return [*packed((*name.split(), *rest))]


def connect(url: str) -> Redis:
    """A client of the server at `url`; nothing is sent yet."""
    return Redis.from_url(
        url,
        socket_timeout=ANSWER,
        socket_connect_timeout=ANSWER,
        socket_read_size=READ,
        command_packer=_Packer(),
        retry=Retry(NoBackoff(), 0),
    )


def run(client: Redis, call: Call) -> Any:
    """The answer of a script. Raises redis-py's errors."""
    try:
        return client.execute_command(*call.command)  # type: ignore[no-untyped-call]  # redis-py annotates only a part
    except NoScriptError:
        client.script_load(script(call.name).text)
        return client.execute_command(*call.command)  # type: ignore[no-untyped-call]  # the same


class Line:
    """A connection for the scripts that each burst of jobs runs: what a client does around one takes longer.

    Threads may share it. It connects with the first call, and anew once it was cut.
    """

    def __init__(self, url: str) -> None:
        self._connection: Any = connect(url).connection_pool.make_connection()  # redis-py's methods lack types
        self._turn = threading.Lock()

    def run(self, call: Call) -> Any:
        """The answer of a script. Raises redis-py's errors."""
        with self._turn:
            self._look()
            try:
                return self._call(*call.command)
            except NoScriptError:
                self._call("SCRIPT LOAD", script(call.name).text)
                return self._call(*call.command)

    def values(self, keys: Sequence[str]) -> list[Buffer | None]:
        """The values at these keys, each in memory of its own. Raises redis-py's errors, or `OSError`."""
        with self._turn:
            self._look()
            connection, data = self._connection, b""
            connection.send_packed_command(connection.pack_commands(("GET", key) for key in keys), check_health=False)
            found: list[Buffer | None] = []
            try:
                for _ in keys:
                    value, data = _value(connection._sock, data)
                    found.append(value)
            except BaseException:
                connection.disconnect()  # what is still to come would be taken for another answer
                raise
            return found

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


def _value(sock: socket.socket, data: bytes) -> tuple[Buffer | None, bytes]:
    """The next value, and what came behind it; `data` came already."""
    while END not in data:
        data += _came(sock.recv(READ))
    head, _, data = data.partition(END)
    if head in _NOTHING:
        return None, data
    if not head.startswith(b"$"):
        raise ResponseError(head[1:].decode(errors="replace"))
    length = int(head[1:])
    whole = length + len(END)
    value = Value(length, data[:whole])
    while value.missing:
        value.came(_came(sock.recv_into(value.missing)))
    return value.content, data[whole:]


def _came(received: Received) -> Received:
    """What was received, where that is anything."""
    if not received:
        raise RedisConnectionError("closed by the server")
    return received
