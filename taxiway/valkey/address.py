"""Where a Valkey or Redis server is, and what a connection to it says first."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from taxiway.valkey.resp import checked, is_away

Place = str | tuple[str, int]
"""The path of a Unix socket, or a host and a port."""

Command = Sequence[Any]

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
"""What an address begins with."""

_PORT, _SENTINEL_PORT = 6379, 26379
_UNVERIFIED = ("none", "cert_none")


class Script(Protocol):
    """A script that runs on the server, by its digest once it was loaded."""

    @property
    def command(self) -> tuple[Any, ...]:
        """The command that runs it on a server which has it."""

    @property
    def text(self) -> str:
        """What is loaded."""


@dataclass(frozen=True, slots=True)
class Address:
    """One server, and who asks there; with a `service`, the primary that the sentinels at these `places` name."""

    places: tuple[Place, ...]
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: Mapping[str, str] | None = None  # options of the address by name; None without TLS
    service: str = ""
    sentinel_username: str = ""
    sentinel_password: str = field(default="", repr=False)

    @property
    def greeting(self) -> list[Command]:
        """The commands that begin a connection; the last asks a primary that sentinels named whether it is one."""
        select = [("SELECT", self.database)] if self.database else []
        return [*_login(self.username, self.password), *select, *([("HELLO", 2)] if self.service else [])]

    @property
    def question(self) -> Command:
        """What a sentinel is asked."""
        return ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)

    def sentinel(self, place: Place) -> Address:
        """One of the sentinels."""
        return Address((place,), username=self.sentinel_username, password=self.sentinel_password, tls=self.tls)

    def check_greeting(self, answers: Sequence[Any]) -> None:
        """Raise what keeps a connection from use.

        Raises:
            ConnectionError: the server accepts no clients now, or is not a primary.
            ServerError: it refuses this account, or this database.
        """
        for answer in answers:
            if is_away(answer):
                raise ConnectionError(str(answer))
        checked(answers)
        if self.service and dict(zip(answers[-1][::2], answers[-1][1::2], strict=True)).get(b"role") != b"master":
            raise ConnectionError(f"the server that is named the primary of {self.service!r} is none")

    def named(self, answer: Sequence[bytes] | None) -> Place:
        """Where the primary is by a sentinel's answer.

        Raises:
            ConnectionError: the sentinel knows none.
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
    """The address that `redis://NAME:PASSWORD@HOST:PORT/DATABASE` is, with `rediss` for TLS, or `unix://PATH?db=…`.

    Options of TLS are named as redis-py names them (`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_cert_reqs`,
    `ssl_check_hostname`); other options are not ours. `redis+sentinel://NAME:PASSWORD@HOST:PORT,…/DATABASE?service=…`
    (`rediss+sentinel` for TLS) has the hosts of sentinels, and their own `sentinel_username` and `sentinel_password`.

    Raises:
        ValueError: it is no such address.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"no address of a Valkey or Redis server: {parts.scheme}://…")
    options = dict(parse_qsl(parts.query))
    user, _, hosts = parts.netloc.rpartition("@")
    username, _, password = user.partition(":")
    path = unquote(parts.path)
    unix, watched = parts.scheme == "unix", parts.scheme.endswith("+sentinel")
    if watched and not options.get("service"):
        raise ValueError("an address of sentinels has ?service=NAME, the name of what they watch")
    usual = _SENTINEL_PORT if watched else _PORT
    return Address(
        places=(path,) if unix else tuple(_place(host, usual) for host in (hosts.split(",") if watched else [hosts])),
        database=int((not unix and path.strip("/")) or options.get("db") or 0),
        username=unquote(username),
        password=unquote(password),
        tls=options if parts.scheme.startswith("rediss") else None,
        service=options["service"] if watched else "",
        sentinel_username=options.get("sentinel_username", ""),
        sentinel_password=options.get("sentinel_password", ""),
    )


def _login(username: str, password: str) -> list[Command]:
    if username:
        return [("AUTH", username, password)]
    return [("AUTH", password)] if password else []


def _place(text: str, usual: int) -> Place:
    host = urlsplit(f"//{text}")
    return host.hostname or "localhost", host.port or usual
