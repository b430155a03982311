"""A broker as a careful operator runs it: TLS with certificates on both sides, and an account for each kind of process.

Debian's own servers: the embedded Valkey speaks no TLS.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
import redis

from broker.accounts import passwords_from, rabbit_accounts, valkey_accounts
from tests.certificates import authority
from tests.waiting import until

_FILES = {
    "rediss": {"ssl_ca_certs": "ca.pem", "ssl_certfile": "client.pem", "ssl_keyfile": "client.key"},
    "amqps": {"cafile": "ca.pem", "certfile": "client.pem", "keyfile": "client.key"},
}
_VERIFIED = {"rediss": {"ssl_cert_reqs": "required"}, "amqps": {}}
_RABBIT = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # Debian's wrapper in the path would become another user


@dataclass(frozen=True)
class Guarded:
    """Where it is, and what its accounts present."""

    port: int
    folder: Path
    passwords: Mapping[str, str]
    scheme: str = "rediss"

    def url(self, account: str) -> str:
        """The address of an account, with its password and its certificates."""
        names = _FILES[self.scheme]
        query = urlencode({name: self.folder / file for name, file in names.items()} | _VERIFIED[self.scheme])
        vhost = "0" if self.scheme == "rediss" else "%2F"
        return f"{self.scheme}://{account}:{self.passwords[account]}@localhost:{self.port}/{vhost}?{query}"

    def client(self, account: str) -> redis.Redis:
        """A client that is that account."""
        return redis.Redis.from_url(self.url(account))


@contextmanager
def guarded_valkey(folder: Path, classes: Iterable[str]) -> Iterator[Guarded]:
    """Debian's Valkey, with the accounts of a fleet of these classes, and one named `test` that may do everything."""
    binary = needed("valkey-server")
    authority(folder)
    passwords = passwords_from({}) | {"test": "test"}
    (folder / "users.acl").write_text(valkey_accounts(classes, passwords) + "user test on >test ~* &* +@all\n")
    port = free_port()
    settings = f"""\
bind 127.0.0.1
port 0
tls-port {port}
tls-cert-file {folder}/server.pem
tls-key-file {folder}/server.key
tls-ca-cert-file {folder}/ca.pem
aclfile {folder}/users.acl
dir {folder}
save ""
"""
    (folder / "valkey.conf").write_text(settings)
    with (folder / "valkey.log").open("wb") as log:
        process = subprocess.Popen([binary, folder / "valkey.conf"], stdout=log, stderr=log)
    try:
        guarded = Guarded(port, folder, passwords)
        _await(process, guarded.client("test"))
        yield guarded
    finally:
        process.terminate()
        process.wait()


@contextmanager
def guarded_rabbit(folder: Path, classes: Iterable[str]) -> Iterator[Guarded]:
    """Debian's RabbitMQ, with the accounts of a fleet of these classes."""
    binary = needed(str(_RABBIT))
    authority(folder)
    passwords, port = passwords_from({}), free_port()
    (folder / "definitions.json").write_text(json.dumps(rabbit_accounts(classes, passwords)))
    settings = f"""\
listeners.tcp = none
listeners.ssl.local = 127.0.0.1:{port}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/server.pem
ssl_options.keyfile = {folder}/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
load_definitions = {folder}/definitions.json
log.console = true
log.console.level = warning
"""
    (folder / "rabbitmq.conf").write_text(settings)
    places = {
        "CONFIG_FILE": "rabbitmq.conf",
        "ENABLED_PLUGINS_FILE": "plugins",
        "MNESIA_BASE": "data",
        "LOG_BASE": "log",
    }
    told = {f"RABBITMQ_{name}": str(folder / file) for name, file in places.items()}
    told |= {
        "RABBITMQ_NODENAME": f"guarded-{port}@localhost",
        "RABBITMQ_DIST_PORT": str(free_port()),
        "HOME": str(folder),
    }
    told |= {
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "ERL_EPMD_PORT": str(free_port()),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
    }
    with (folder / "console").open("wb") as log:
        process = subprocess.Popen(
            [binary],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=os.environ | told,
            start_new_session=True,  # so that its script and its machine end together
        )
    try:
        _await_port(process, port)
        yield Guarded(port, folder, passwords, "amqps")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kill = ["epmd", "-kill"]  # the name server that it alone used, once that has seen it end
        until(lambda: not subprocess.run(kill, env=os.environ | told, capture_output=True, check=False).returncode)


def needed(program: str) -> str:
    """The program's path; without it the test is skipped, and in CI fails."""
    found = shutil.which(program)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"no {program} here: in CI this must be tested")
    if found is None:
        pytest.skip(f"no {program} here (Debian: apt-get install {program})")
    return found


def free_port() -> int:
    """A port of the loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError as error:
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError("the server did not start") from error
            time.sleep(0.1)
        else:
            return


def _await(process: subprocess.Popen[bytes], client: redis.Redis) -> None:
    end = time.monotonic() + 10
    with client:
        while True:
            try:
                client.ping()
            except redis.ConnectionError as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise AssertionError("the server did not start") from error
                time.sleep(0.02)
            else:
                return
