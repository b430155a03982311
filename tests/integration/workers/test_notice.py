"""A cloud's metadata address, as AWS has it: it tells nothing without a token, and nothing stands there at first."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tasks.topology import Notice
from workers.drain import NoticeWatch


class Metadata(ThreadingHTTPServer):
    """Serves tokens for one read each, and the `notice` if there is one."""

    notice: str | None = None
    token = 0


class _Interface(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        self.server.token += 1
        self._answer(200 if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else 400, str(self.server.token))

    def do_GET(self) -> None:
        known = self.headers["X-aws-ec2-metadata-token"] == str(self.server.token)
        self.server.token += 1  # the next read needs another one
        if not known or self.headers["Metadata"] != "true":
            self._answer(401, "")
        elif self.server.notice is None:
            self._answer(404, "not found")
        else:
            self._answer(200, self.server.notice)

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata(("127.0.0.1", 0), _Interface) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def watch_of(port: int, leave: Callable[[float], None]) -> NoticeWatch:
    address = f"http://127.0.0.1:{port}"
    notice = Notice(
        url=f"{address}/spot/instance-action", token_url=f"{address}/api/token", headers={"Metadata": "true"}, grace=7
    )
    return NoticeWatch(notice, leave)


def test_what_stands_at_the_address_is_a_notice_and_nothing_before(metadata: Metadata) -> None:
    watch = watch_of(metadata.server_port, print)
    assert watch.look() is None
    metadata.notice = '{"action": "terminate"}'
    assert watch.look() == 7.0


def test_the_watch_reports_a_notice_until_it_is_stopped(metadata: Metadata) -> None:
    heard: queue.SimpleQueue[float] = queue.SimpleQueue()
    watch = watch_of(metadata.server_port, heard.put)
    metadata.notice = "soon"
    running = threading.Thread(target=watch.run)
    running.start()
    assert heard.get(timeout=60) == 7.0
    watch.stop()
    running.join(60)
    assert not running.is_alive()


def test_an_address_that_does_not_answer_is_no_notice() -> None:
    assert watch_of(9, print).look() is None  # the discard port, without a listener
