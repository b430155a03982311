"""A server that receives webhooks, as scripted."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.waiting import in_thread


@dataclass(frozen=True)
class Delivery:
    """A request that came."""

    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        """The event in its body."""
        event: dict[str, Any] = json.loads(self.body)
        return event


class Receiver:
    """What came, in order, and how it is answered: `answer` gives the status and further headers."""

    def __init__(self) -> None:
        self.url = ""
        self.deliveries: list[Delivery] = []
        self.answer: Callable[[Delivery], tuple[int, dict[str, str]]] = lambda _: (200, {})
        self.most_at_once = 0
        self.at_once = 0
        self.lock = threading.Lock()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events that came."""
        return [one.event for one in self.deliveries]

    @property
    def ids(self) -> set[str]:
        """The ids under which events came."""
        return {one.headers["webhook-id"] for one in self.deliveries}

    def about(self, name: str) -> list[Delivery]:
        """What came about a job or batch."""
        return [one for one in self.deliveries if one.event["data"]["id"] == name]


@contextmanager
def receiving(host: str = "127.0.0.1") -> Iterator[Receiver]:
    """A receiver at an address of the loopback."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            delivery = Delivery({name.lower(): value for name, value in self.headers.items()}, body)
            with receiver.lock:
                receiver.at_once += 1
                receiver.most_at_once = max(receiver.most_at_once, receiver.at_once)
                receiver.deliveries.append(delivery)
            try:
                status, headers = receiver.answer(delivery)
                self.send_response(status)
                for name, value in {"content-length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
            except OSError:  # the sender went away
                self.close_connection = True
            finally:
                with receiver.lock:
                    receiver.at_once -= 1

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer((host, 0), Handler) as server, in_thread(server.serve_forever, 0.05, stop=server.shutdown):
        receiver.url = f"http://{host}:{server.server_port}/hook"
        yield receiver
