"""Our own connections to Valkey or Redis: each connects to an `Address`, without hidden retries.

`taxiway.connection` has the one for asyncio and the blocking one. Here is what they share: a server's address, the
greeting of a connection, and the encoding of commands and answers, in C (hiredis). Source: the Redis serialization
protocol (RESP2).

A connection that fails raises `OSError` (`TimeoutError` and `ConnectionError` are subclasses); an error that the server
answers with is a `ServerError`. Celery and kombu have connections of their own.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

import hiredis

from taxiway.contract.limits import Buffer
from taxiway.contract.wire import refusal

Place = str | tuple[str, int]
"""The path of a Unix socket, or a host and a port."""

Command = Sequence[Any]

Calls = Callable[..., Awaitable[list[Any]]]
"""Sends commands together; returns their answers as RESP 2 has them, or raises an error among them."""

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
"""The schemes of addresses."""

_PORT, _SENTINEL_PORT = 6379, 26379
_UNVERIFIED = ("none", "cert_none")


class Script(Protocol):
    """A script that runs on the server, by its digest once it is loaded."""

    @property
    def command(self) -> tuple[Any, ...]:
        """The command that runs it on a server that has it loaded."""

    @property
    def text(self) -> str:
        """Its source."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server and the account used there."""

    places: tuple[Place, ...]
    """The servers; with a `service`, its sentinels."""
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: Mapping[str, str] | None = None  # options of the address by name; None without TLS
    service: str = ""
    """Name of the primary that the sentinels know."""
    sentinel_username: str = ""
    sentinel_password: str = field(default="", repr=False)

    @property
    def greeting(self) -> list[Command]:
        """The first commands of a connection; the last one checks that a server named by sentinels is a primary."""
        select = [("SELECT", self.database)] if self.database else []
        return [*_login(self.username, self.password), *select, *([("HELLO", 2)] if self.service else [])]

    @property
    def question(self) -> Command:
        """The command that asks a sentinel for the primary."""
        return ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)

    def sentinel(self, place: Place) -> Address:
        """One of the sentinels."""
        return Address((place,), username=self.sentinel_username, password=self.sentinel_password, tls=self.tls)

    def check_greeting(self, answers: Sequence[Any]) -> None:
        """Check the answers to `greeting`.

        Raises:
            ConnectionError: the server accepts no clients now, or is not a primary.
            ServerError: it refuses this account, or this database.
        """
        for answer in answers:
            if is_unavailable(answer):
                raise ConnectionError(str(answer))
        checked(answers)
        if self.service and dict(zip(answers[-1][::2], answers[-1][1::2], strict=True)).get(b"role") != b"master":
            raise ConnectionError(f"the server that sentinels name as the primary of {self.service!r} is not a primary")

    def primary_of(self, answer: Sequence[bytes] | None) -> Place:
        """The primary's place in a sentinel's answer.

        Raises:
            ConnectionError: the sentinel does not know the service.
        """
        if answer is None:
            raise ConnectionError(f"the sentinel knows no service {self.service!r}")
        return answer[0].decode(), int(answer[1])

    def context(self) -> ssl.SSLContext | None:
        """The TLS context; the files are read on every call because they may have been renewed."""
        if self.tls is None:
            return None
        context = ssl.create_default_context(cafile=self.tls.get("ssl_ca_certs"))
        if self.tls.get("ssl_certfile"):
            context.load_cert_chain(self.tls["ssl_certfile"], self.tls.get("ssl_keyfile"))
        unverified = self.tls.get("ssl_cert_reqs", "").lower() in _UNVERIFIED
        if unverified or self.tls.get("ssl_check_hostname", "").lower() in ("false", "0", "no"):
            context.check_hostname = False
        if unverified:
            context.verify_mode = ssl.CERT_NONE
        return context


def parse(url: str) -> Address:
    """Parse `redis://NAME:PASSWORD@HOST:PORT/DATABASE`, with `rediss` for TLS, or `unix://PATH?db=…`.

    TLS options have redis-py's names (`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_cert_reqs`,
    `ssl_check_hostname`); other options are ignored. `redis+sentinel://NAME:PASSWORD@HOST:PORT,…/DATABASE?service=…`
    (`rediss+sentinel` for TLS) has the hosts of sentinels, and their own `sentinel_username` and `sentinel_password`.

    Raises:
        ValueError: not such an address.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"not an address of a Valkey or Redis server: {parts.scheme}://…")
    options = dict(parse_qsl(parts.query))
    user, _, hosts = parts.netloc.rpartition("@")
    username, _, password = user.partition(":")
    path = unquote(parts.path)
    unix, by_sentinel = parts.scheme == "unix", parts.scheme.endswith("+sentinel")
    if by_sentinel and not options.get("service"):
        raise ValueError("expected ?service=NAME in an address of sentinels, the name of the primary that they watch")
    default_port = _SENTINEL_PORT if by_sentinel else _PORT
    return Address(
        places=(path,)
        if unix
        else tuple(_place(host, default_port) for host in (hosts.split(",") if by_sentinel else [hosts])),
        database=int((not unix and path.strip("/")) or options.get("db") or 0),
        username=unquote(username),
        password=unquote(password),
        tls=options if parts.scheme.startswith("rediss") else None,
        service=options["service"] if by_sentinel else "",
        sentinel_username=options.get("sentinel_username", ""),
        sentinel_password=options.get("sentinel_password", ""),
    )


def _login(username: str, password: str) -> list[Command]:
    if username:
        return [("AUTH", username, password)]
    return [("AUTH", password)] if password else []


def _place(text: str, default_port: int) -> Place:
    host = urlsplit(f"//{text}")
    name = host.hostname or "localhost"
    name.encode("idna")  # as the resolver will: an error of the address is a ValueError here
    return name, host.port or default_port


_UNAVAILABLE = ("READONLY", "LOADING", "MASTERDOWN", "UNBLOCKED", "ERR max number of clients")


class ServerError(Exception):
    """An error that the server answered with; its text begins with its code."""


def is_unavailable(answer: Any) -> bool:
    """Whether the server answers that it is not a primary, or not ready yet: another connection may reach one."""
    return isinstance(answer, ServerError) and str(answer).startswith(_UNAVAILABLE)


def is_unknown_script(answer: Any) -> bool:
    """Whether the server answers that it does not have the script loaded."""
    return isinstance(answer, ServerError) and str(answer).startswith("NOSCRIPT")


def checked(answers: Sequence[Any]) -> list[Any]:
    """The answers. Raises the first error among them."""
    for answer in answers:
        if isinstance(answer, ServerError):
            raise answer
    return [*answers]


class fleet_errors(AbstractContextManager[None]):
    """Raises `FleetUnavailable`, naming `server`, if it does not answer or refuses; without a name, changes nothing.

    A class, because a generator would cost 2 % of a call.
    """

    __slots__ = ("_server",)

    def __init__(self, server: str) -> None:
        self._server = server

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._server and isinstance(error, (ServerError, OSError)):
            raise refusal(self._server, error) from error


LARGE = 2**16
"""Bytes above which a value is not copied."""

WRITE = 4 * 2**20
"""Bytes of a value per command. Of 64 MiB in one, the server's log and copies kept all other callers waiting 0.5 to
0.8 s, and in commands of 4 MiB 0.05 to 0.08 s, at half of its processor time (two busy cores, 1 December 2026)."""

READ = 2**18
"""Bytes per read: with redis-py's 64 KiB, a large answer takes four times the CPU time."""

END = b"\r\n"

_VALUE = ord("$")
_LONGEST_HEAD = 24  # of a value: its length has 20 digits at most


def packed(command: Sequence[Any]) -> Iterator[Buffer]:
    """The bytes of a command; each large value separately, without a copy."""
    if not any(map(is_large, command)):
        yield hiredis.pack_command(tuple(command))
        return
    text = b"*%d" % len(command)
    for argument in command:
        value = argument if isinstance(argument, Buffer) else str(argument).encode()
        text += b"\r\n$%d\r\n" % len(value)
        if is_large(value):
            yield text
            yield memoryview(value)
            text = b""
        else:
            text += value
    yield text + END


def stored(key: str, content: Buffer, seconds: int) -> list[Command]:
    """Commands that store a value for some seconds; each may be repeated, also after later ones.

    The key is the value's alone: one that is there has these bytes, or some of them.
    """
    view = memoryview(content)
    starts = range(WRITE, len(view), WRITE)
    first: Command = ("SET", key, view[:WRITE], "EX", seconds)
    return [(*first, "NX"), *(("SETRANGE", key, start, view[start : start + WRITE]) for start in starts)]


def is_large(argument: Any) -> bool:
    """Whether an argument is a value too large to copy."""
    return type(argument) is not str and isinstance(argument, Buffer) and len(argument) > LARGE


def pieces(commands: Iterable[Sequence[Any]]) -> Iterator[Buffer]:
    """The bytes of commands that are sent together, in as few pieces as possible without copying large values."""
    parts = (piece for command in commands for piece in packed(command))
    for large, some in groupby(parts, is_large):
        if large:
            yield from some
        else:
            yield b"".join(some)


class AnswerParser:
    """Parses received bytes into answers; an error from the server is a value.

    A large value is read into its own memory.
    """

    def __init__(self) -> None:
        self._reader = hiredis.Reader(replyError=ServerError)
        self._read = memoryview(bytearray(READ))
        self._large: memoryview | None = None  # a large value that has begun, with its line end
        self._at = 0  # what has arrived of it, in bytes
        self._midway = False  # whether the reader has parsed the start of an answer

    def buffer(self) -> memoryview:
        """The buffer for the next bytes."""
        return self._read if self._large is None else self._large[self._at :]

    def received(self, count: int) -> Iterator[Any]:
        """The answers that are complete once `count` bytes were written to `buffer`.

        Raises:
            ConnectionError: the bytes are not RESP.
        """
        if self._large is None:
            at = yield from self._values(count)
            if self._large is None:
                yield from self._parsed(at, count)
        else:
            self._at += count
        if self._large is not None and self._at == len(self._large):
            content, self._large = self._large[: -len(END)], None
            yield content.toreadonly()

    def _values(self, count: int) -> Generator[Any, None, int]:
        """Yield the leading values, up to a large incomplete one; returns the index of the rest."""
        at = 0
        while at < count and self._read[at] == _VALUE and not self._midway:
            head, found, _ = bytes(self._read[at : min(at + _LONGEST_HEAD, count)]).partition(END)
            length, begin = int(head[1:]) if found else 0, at + len(head) + len(END)
            end = begin + length + len(END)
            if end > count and length > LARGE:
                self._large, self._at = memoryview(bytearray(length + len(END))), count - begin
                self._large[: self._at] = self._read[begin:count]
            if not found or end >= count or length < 0:
                break
            yield bytes(self._read[begin : begin + length])
            at = end
        return at

    def _parsed(self, at: int, count: int) -> Iterator[Any]:
        if at == count:
            return
        try:
            self._reader.feed(self._read, at, count - at)  # type: ignore[arg-type]  # it takes any buffer
            self._midway = True
            while (answer := self._reader.gets()) is not False:
                self._midway = self._reader.has_data()
                yield answer
        except hiredis.HiredisError as error:
            raise ConnectionError(str(error)) from error
