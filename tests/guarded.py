"""A broker as a careful operator runs it: TLS with certificates on both sides, and an account for each kind of process.

The embedded Valkey speaks no TLS: `TlsFront` does that for it, as stunnel would.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
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
        with TlsFront(port, folder) as front:
            yield Guarded(front.port, folder, passwords)
    finally:
        process.terminate()
        process.wait()


class TlsFront:
    """TLS before a server of this machine: it lets in who shows a certificate of the authority in `folder`."""

    def __init__(self, target: int, folder: Path) -> None:
        self._target = target
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
        self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._carry, "localhost", 0, family=socket.AF_INET, ssl=self._context)
        )
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.port: int = self._server.sockets[0].getsockname()[1]

    def __enter__(self) -> TlsFront:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.1)  # aborted connections close their sockets

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in (writer, far_writer):
                end.transport.abort()


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
