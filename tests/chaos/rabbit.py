"""A RabbitMQ server that the suite starts and may kill."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import kombu
import kombu.exceptions

from local.children import kill_group, start_child
from local.embedded import kept_port

SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""Debian's path; the wrapper on the PATH switches to another user."""

_TIMEOUT = 90.0  # seconds within which it must answer


class RabbitServer:
    """A node in `folder` on a loopback port, with its own name server. A restart keeps its data."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.port, self._distribution, self._names = (
            kept_port(folder / f"{name}.port") for name in ("amqp", "distribution", "names")
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process id; None if it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def url(self) -> str:
        """The server's address."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def start(self) -> None:
        """Start the server, and wait until it answers.

        Raises:
            RuntimeError: it did not answer in time.
        """
        configuration = self._folder / "rabbitmq.conf"
        configuration.write_text(f"listeners.tcp.local = 127.0.0.1:{self.port}\nlog.console.level = warning\n")
        with (self._folder / "console.log").open("ab") as log:
            self._process = start_child(
                [str(SERVER)], environment=self._environment(), output=log.fileno(), errors=log.fileno()
            )
        end = time.monotonic() + _TIMEOUT
        while not self._answers():
            if time.monotonic() > end or self._process.poll() is not None:
                raise RuntimeError(f"RabbitMQ did not start: see {self._folder / 'console.log'}")
            time.sleep(0.2)

    def kill(self) -> None:
        """`kill -9` of the process group."""
        if self._process is not None:
            kill_group(self._process)
            self._process.wait()

    def stop(self) -> None:
        """Stop the server and its name server."""
        self.kill()
        subprocess.run(["epmd", "-kill"], env=self._environment(), capture_output=True, check=False)

    def _environment(self) -> dict[str, str]:
        folder = self._folder
        return {
            **os.environ,
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(self._names),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"taxiway-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
        }

    def _answers(self) -> bool:
        try:
            with kombu.Connection(self.url, connect_timeout=2) as connection:
                connection.ensure_connection(max_retries=1, timeout=2)
        except (OSError, kombu.exceptions.OperationalError):
            return False
        return True
