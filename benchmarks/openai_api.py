"""How much longer does a chat completion take through OpenAI's API than through the Open Inference Protocol?

`python -m benchmarks.openai_api` starts one Valkey, a router and a worker before a server of OpenAI's protocol that
answers every chat with one word at once. It asks for the same chat by either interface in turn, one request at a time
on one connection each, and prints milliseconds, their difference (target: at most 1 ms at the median) and their ratio.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import socketserver
import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import answer, percentile, say
from benchmarks.harness.processes import fleet
from benchmarks.idle_round_trip import WARM_UP, RoundTrip, timed
from tasks.settings import TREE

TARGET = 1.0
"""Milliseconds that the median of a chat completion may take longer."""

_TURN = 5
_CHAT = {"messages": [{"role": "user", "content": "Say a word."}], "max_tokens": 8}
_QUEUES = """
hardware:
  cpu.batch:
    device: endpoint
    endpoint: {{protocol: openai, url: "http://127.0.0.1:{port}/v1", slots: 4, models: {{chat: served}}}}
    price: {{usd_per_hour: 0.05}}
service: {{standard: {{deadline: 60}}}}
default_service: standard
"""
_CHOICE = {"index": 0, "delta": {"content": "Word"}, "finish_reason": "stop"}
_USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
_SAID = "".join(f"data: {json.dumps(one)}\n\n" for one in ({"choices": [_CHOICE]}, {"choices": [], "usage": _USAGE}))
_STREAM = f"{_SAID}data: [DONE]\n\n".encode()
_MODELS = json.dumps({"data": [{"id": "served"}]}).encode()


class _Engine(BaseHTTPRequestHandler):
    """Answers every chat with one word."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._say(_MODELS, "application/json")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._say(_STREAM, "text/event-stream")

    def log_message(self, *_: object) -> None:
        pass

    def _say(self, content: bytes, kind: str) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n\r\n"
        self.wfile.write(head.encode() + content)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


def main() -> None:
    """Measure, and print one JSON line for each figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.openai_api", description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="requests of each interface in a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each gives one figure of the median and spread")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, _engine() as port:
        queues = Path(name) / "queues.yaml"
        queues.write_text(_QUEUES.format(port=port))
        workers = [["--class", "cpu.batch", "--device", "endpoint:0"]]
        with fleet(Path(name), queues, workers, TREE / "models") as interfaces:
            rounds = measured(interfaces.http, requests=given.requests, rounds=given.rounds)
    for line in lines(rounds):
        say(line)


def measured(url: str, *, requests: int, rounds: int) -> Sequence[Mapping[str, Sequence[float]]]:
    """For each round, by interface, the seconds of each request."""
    address = url.removeprefix("http://")
    tensor = {"name": "request", "shape": [1], "datatype": "BYTES", "data": [_CHAT]}
    asked = {
        "oip": ("/v2/models/chat/infer", {"inputs": [tensor]}),
        "openai": ("/v1/chat/completions", {"model": "chat", **_CHAT}),
    }
    interfaces = {name: partial(_ask, http.client.HTTPConnection(address), *call) for name, call in asked.items()}
    for ask in interfaces.values():
        timed(ask, WARM_UP)
    return [_one_round(interfaces, turns=requests // _TURN) for _ in range(rounds)]


def lines(rounds: Sequence[Mapping[str, Sequence[float]]]) -> Iterator[Mapping[str, object]]:
    """What is printed."""
    for name in ("oip", "openai"):
        for share in (50, 99):
            figures = [1000 * percentile(list(times[name]), share) for times in rounds]
            yield answer(f"chat completion, one word, {name} p{share} ms", figures)
    middles = [{name: statistics.median(taken) for name, taken in times.items()} for times in rounds]
    more = [1000 * (one["openai"] - one["oip"]) for one in middles]
    yield answer("chat completion, openai less oip, p50 ms", more, target=TARGET)
    yield answer("chat completion, openai / oip, p50", [one["openai"] / one["oip"] for one in middles])


def _one_round(interfaces: Mapping[str, RoundTrip], *, turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in interfaces}
    for _ in range(turns):
        for name, ask in interfaces.items():
            gc.collect()
            times[name] += timed(ask, _TURN)
    return times


def _ask(connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any]) -> None:
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    answered = connection.getresponse()
    content = answered.read()
    if answered.status != 200:
        raise RuntimeError(f"{path}: {answered.status} {content[:500]!r}")


@contextmanager
def _engine() -> Iterator[int]:
    """The server's port."""
    with _Server(("127.0.0.1", 0), _Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


if __name__ == "__main__":
    main()
