"""What tells a worker to leave: a cloud's metadata address, as AWS has it, and the hours of its class."""

import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tasks.settings import Settings
from tasks.topology import Notice
from tests.forked import start
from tests.working import CLASS, QUEUES, worker_settings
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
    received: queue.SimpleQueue[float] = queue.SimpleQueue()
    watch = watch_of(metadata.server_port, received.put)
    metadata.notice = "soon"
    running = threading.Thread(target=watch.run)
    running.start()
    assert received.get(timeout=60) == 7.0
    watch.stop()
    running.join(60)
    assert not running.is_alive()


def test_an_address_that_does_not_answer_is_no_notice() -> None:
    assert watch_of(9, print).look() is None  # the discard port, without a listener


@pytest.mark.parametrize(("begin", "end", "opens"), [(2, 3, 2), (-1, 1, 23)])
def test_a_worker_waits_until_its_class_serves_for_longer_than_a_drain_takes(
    settings: Settings, tmp_path: Path, begin: int, end: int, opens: int
) -> None:
    now = datetime.now(UTC)
    hours = f'"{now + timedelta(hours=begin):%H:%M}-{now + timedelta(hours=end):%H:%M}"'
    queues = QUEUES.replace("    warm: ", f"    available: {{hours: {hours}}}\n    warm: ")
    fleet = worker_settings(settings, tmp_path, queues.replace("lease: 1", "lease: 1, grace: 7200"))
    process = start("workers", "workers", ["--class", CLASS], {**os.environ, **fleet.environment()}, None)
    assert process.stdout is not None
    try:
        waits = json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

    left = datetime.fromisoformat(waits.pop("opens")) - now
    assert (waits["ready"], waits["device"]) == ("worker", "cpu:0")
    assert abs(left - timedelta(hours=opens)) <= timedelta(minutes=1)


@pytest.mark.parametrize(("left", "notice"), [(math.inf, None), (61.0, None), (60.0, 60.0), (0.0, 0.0)])
def test_the_last_seconds_of_its_hours_are_a_notice_to_a_worker(left: float, notice: float | None) -> None:
    assert NoticeWatch(Notice(), print, closes=lambda: left, grace=60.0).look() == notice
