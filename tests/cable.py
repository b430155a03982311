"""A TCP proxy on loopback: a cable that can be pulled out, slowed down, and plugged in elsewhere."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit, urlunsplit

_CHUNK = 2**20  # bytes: a delay must not narrow the cable
_SHORT = 2**14  # of a narrow one


class Cable:
    """Carries connections to `(host, port)`; every byte waits `delay` seconds on its way, and its turn at `rate`."""

    def __init__(self, host: str, port: int) -> None:
        self.delay = 0.0
        self.rate = math.inf  # bytes a second, of each connection and way
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._ends: set[socket.socket] = set()
        self._forgotten: set[socket.socket] = set()
        self._plugged = True
        threading.Thread(target=self._accept, daemon=True).start()

    def pull(self) -> None:
        """Cut every connection and refuse new ones."""
        self._plugged = False
        self.cut()

    def plug(self) -> None:
        """Let connections through again."""
        self._plugged = True

    def cut(self) -> None:
        """Cut every connection; new ones are let through."""
        for end in tuple(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        """Carry nothing more on the connections that there are, and tell neither end."""
        self._forgotten |= self._ends

    def redirect(self, host: str, port: int) -> None:
        """Carry new connections to another server, and cut those that there are."""
        self._target = (host, port)
        self.cut()

    def close(self) -> None:
        """Cut everything for good."""
        self.pull()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = self._dial() if self._plugged else None
                if far is None:
                    near.close()
                    continue
                self._ends |= {near, far}
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _dial(self) -> socket.socket | None:
        """A connection to the server; None if nothing listens there."""
        with suppress(OSError):
            return socket.create_connection(self._target)
        return None

    def _taken(self, source: socket.socket, chunk: bytes) -> None:
        """What came from an end passes here; nothing is done with it."""

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with source, suppress(OSError):
            while chunk := source.recv(_CHUNK if math.isinf(self.rate) else _SHORT):
                self._taken(source, chunk)
                if source in self._forgotten:
                    continue
                if pause := self.delay + len(chunk) / self.rate:
                    time.sleep(pause)
                sink.sendall(chunk)
        if source in self._forgotten:
            return
        self._ends.discard(source)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


def through(url: str, cable: Cable) -> str:
    """A server's address at the near end of the cable to it."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{cable.port}"))


@contextmanager
def cable_to(url: str) -> Iterator[tuple[Cable, str]]:
    """A cable to the server of that address, and the server's address at its near end."""
    parts = urlsplit(url)
    cable = Cable(parts.hostname or "", parts.port or 0)
    try:
        yield cable, through(url, cable)
    finally:
        cable.close()


class Balancer(Cable):
    """Carries each new connection to the next of its targets that accepts one, as the simplest balancers do."""

    def __init__(self, *urls: str) -> None:
        self._targets: list[tuple[str, int]] = []
        self.add(*urls)
        super().__init__("", 0)

    @property
    def url(self) -> str:
        """Its own address."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, *urls: str) -> None:
        """Carry new connections to these, too."""
        self._targets += [(urlsplit(url).hostname or "", urlsplit(url).port or 0) for url in urls]

    def _dial(self) -> socket.socket | None:
        for _ in self._targets:
            self._targets.append(self._targets.pop(0))
            self._target = self._targets[-1]
            connection = super()._dial()
            if connection is not None:
                return connection
        return None
