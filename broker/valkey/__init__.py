"""Queues, holding and job records on Valkey or Redis: server-side scripts, and the connections that run them.

Each script is atomic, and named by its folder and file, for example `jobs/finish` (shared parts are in `includes/`).
Its header describes its keys and arguments. The functions that make its calls and read its answers are together, by
topic, such as `jobs` and `processes`. A server whose memory is full runs only scripts that begin with
`#!lua flags=allow-oom`: they end accepted work, which frees memory. It refuses others before they write anything.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from redis import Redis

packed = msgspec.msgpack.Encoder().encode
"""Encodes what belongs to one job, message or group, for a script to read with `cmsgpack.unpack`."""

_TEXT_HEAD = struct.Struct(">BI").pack  # MessagePack's str 32, with the length

FOLDER = Path(__file__).parent / "scripts"
"""Where the scripts are."""

_INCLUDE = re.compile(r'^--- @include "(\w+)"\n', re.MULTILINE)


class Call(NamedTuple):
    """A script, by its folder and file, with its keys and arguments."""

    name: str
    keys: Sequence[str]
    args: Sequence[Any] = ()

    @property
    def command(self) -> tuple[Any, ...]:
        """The command that runs it on a server that has it loaded."""
        return ("EVALSHA", _digest(self.name), len(self.keys), *self.keys, *self.args)

    @property
    def text(self) -> str:
        """The script's source."""
        return script(self.name)


def as_text(data: bytes) -> msgspec.Raw:
    """Bytes in a map for a script: its MessagePack reads any bytes as text, but knows no binary type."""
    return msgspec.Raw(_TEXT_HEAD(0xDB, len(data)) + data)


def flat(fields: Mapping[str, str]) -> list[str]:
    """Each field followed by its value, as `HSET` takes them."""
    return [text for pair in fields.items() for text in pair]


@cache
def script(name: str) -> str:
    """The source of the script of that folder and file; each include is inserted where it is first named."""
    included = set[str]()

    def resolve(found: re.Match[str]) -> str:
        if found[1] in included:
            return ""
        included.add(found[1])
        return _INCLUDE.sub(resolve, (FOLDER / "includes" / f"{found[1]}.lua").read_text())

    return _INCLUDE.sub(resolve, (FOLDER / f"{name}.lua").read_text())


@cache
def _digest(name: str) -> str:
    """By which a server identifies the script."""
    return hashlib.sha1(script(name).encode()).hexdigest()


def run(client: Redis, call: Call) -> Any:
    """Run a script with a client of redis-py, which Celery has."""
    from redis.exceptions import NoScriptError  # now, not above: a router has no use for redis-py, and starts sooner

    try:
        return client.execute_command(*call.command)  # type: ignore[no-untyped-call]  # redis-py annotates only a part
    except NoScriptError:
        client.script_load(call.text)
        return client.execute_command(*call.command)  # type: ignore[no-untyped-call]  # the same
