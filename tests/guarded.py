"""A broker as a careful operator runs it: TLS with certificates on both sides, and an account for each kind of process.

The embedded Valkey speaks no TLS: `TlsFront` does that for it, as stunnel would.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import redis

from broker.accounts import passwords_from, valkey_accounts
from local.embedded import find_binary, free_port
from tests.certificates import authority
from tests.listening import listening

_FILES = {"ssl_ca_certs": "ca.pem", "ssl_certfile": "client.pem", "ssl_keyfile": "client.key"}
_STARTED_WITHIN = 180.0  # seconds


@dataclass(frozen=True)
class Guarded:
    """Where it is, and what its accounts present."""

    port: int
    folder: Path
    passwords: Mapping[str, str]

    def url(self, account: str) -> str:
        """The address of an account, with its password and its certificates."""
        query = urlencode({name: self.folder / file for name, file in _FILES.items()} | {"ssl_cert_reqs": "required"})
        return f"rediss://{account}:{self.passwords[account]}@localhost:{self.port}/0?{query}"

    def client(self, account: str) -> redis.Redis:
        """A client that is that account."""
        return redis.Redis.from_url(self.url(account))


@contextmanager
def guarded_valkey(folder: Path, classes: Iterable[str]) -> Iterator[Guarded]:
    """The embedded Valkey with the accounts of a fleet of these classes, and one named `test` that may do all."""
    authority(folder)
    classes = [*classes]
    passwords = passwords_from({}, classes) | {"test": "test"}
    (folder / "users.acl").write_text(valkey_accounts(classes, passwords) + "user test on >test ~* &* +@all\n")
    port = free_port()
    settings = f"""\
bind 127.0.0.1
port {port}
aclfile {folder}/users.acl
dir {folder}
save ""
"""
    (folder / "valkey.conf").write_text(settings)
    with (folder / "valkey.log").open("wb") as log:
        process = subprocess.Popen([find_binary(), folder / "valkey.conf"], stdout=log, stderr=log)
    try:
        _await_port(process, port)
        with tls_front(port, folder) as front:
            yield Guarded(front, folder, passwords)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def tls_front(target: int, folder: Path) -> Iterator[int]:
    """TLS before a server of this machine: it lets in who shows a certificate of the authority in `folder`.

    Yields its port.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        try:
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        except OSError:
            pass
        finally:
            for end in (writer, far_writer):
                end.transport.abort()

    with listening(carry, ssl=context) as port:
        yield port


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while chunk := await source.read(2**16):
            sink.write(chunk)
            await sink.drain()
    finally:
        sink.close()


def _await_port(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + _STARTED_WITHIN
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError as error:
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError("the server did not start") from error
            time.sleep(0.1)
        else:
            return
