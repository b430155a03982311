"""Batches, which run through all faults: every line must be in an output or error file, once, with its own answer.

They are in turn of OpenAI's embeddings, and of runs with checkpoints, which yield to requests with a deadline.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.chaos.history import BatchRead, Recorder

MODEL = "embed"

RUNS = 30
"""Lines of a batch of runs; one takes about a second."""

TIMEOUT = 60.0
"""Seconds for which a call is tried again at another router."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """Batches of so many `lines`, which ask an endpoint."""

    endpoint: str
    lines: int
    body: Callable[[int], dict[str, Any]]

    def line(self, number: int) -> dict[str, Any]:
        return {"custom_id": str(number), "method": "POST", "url": self.endpoint, "body": self.body(number)}


_ENDED = ("completed", "failed", "expired", "cancelled")
_POLL = 0.5


class Batches:
    """Runs batches on a thread, one after the other, until `finish`; records how each ended. `lines` is of embeddings.

    `left` is the number of lines without an answer as of the last look; 0 once the last batch has ended.
    """

    def __init__(self, routers: Sequence[str], lines: int, recorder: Recorder) -> None:
        self.left = lines
        self._kinds = itertools.cycle(
            (_Kind("/v1/embeddings", lines, _text), _Kind("/v2/models/walk/infer", RUNS, _walk))
        )
        self._recorder = recorder
        self._routers = itertools.cycle(routers)
        self._http = httpx.Client(timeout=10, trust_env=False)
        self._finishing, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def finish(self) -> None:
        """Begin no more batches."""
        self._finishing.set()

    def stop(self) -> None:
        """Wait no longer for the last one."""
        self.finish()
        self._given_up.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._finishing.is_set():
            kind, began = next(self._kinds), time.time()
            self.left = kind.lines
            try:
                self._recorder.record(self._run_one(kind, began))
            except httpx.HTTPStatusError:  # its record is gone, which a failover may explain
                self._recorder.record(BatchRead(status="gone", began=began, lines=kind.lines, missing=kind.lines))
        self.left = 0

    def _run_one(self, kind: _Kind, began: float) -> BatchRead:
        batch = self._begin(kind)
        while batch["status"] not in _ENDED and not self._given_up.wait(_POLL):
            batch = self._ask("GET", f"batches/{batch['id']}").json()
            counts = batch["request_counts"]
            self.left = max(kind.lines - counts["completed"] - counts["failed"], 1)
        answered, failed = (self._read(batch.get(name)) for name in ("output_file_id", "error_file_id"))
        found = Counter(line["custom_id"] for line in answered + failed)
        runs = [(int(line["custom_id"]), _outputs(line)) for line in answered if "outputs" in line["response"]["body"]]
        return BatchRead(
            status=batch["status"],
            began=began,
            lines=kind.lines,
            answered=len(answered),
            missing=sum(not found[str(number)] for number in range(kind.lines)),
            repeated=sum(count - 1 for count in found.values()),
            wrong=sum(run["number"] != number for number, run in runs),
            resumed=sum(run["resumed"] for _, run in runs),
            yielded=sum(run["yielded"] for _, run in runs),
        )

    def _begin(self, kind: _Kind) -> dict[str, Any]:
        content = "\n".join(json.dumps(kind.line(number)) for number in range(kind.lines)).encode()
        file = self._ask("POST", "files", data={"purpose": "batch"}, files={"file": ("lines.jsonl", content)}).json()
        asked = {"input_file_id": file["id"], "endpoint": kind.endpoint, "completion_window": "24h"}
        begun: dict[str, Any] = self._ask("POST", "batches", json=asked).json()
        return begun

    def _read(self, file: str | None) -> list[dict[str, Any]]:
        """The lines of a file."""
        text = "" if file is None else self._ask("GET", f"files/{file}/content").text
        return [json.loads(line) for line in text.splitlines()]

    def _ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Call the routers in turn until one answers; raises HTTPStatusError if the request is wrong."""
        ends = time.monotonic() + TIMEOUT
        while True:
            try:
                response = self._http.request(method, f"{next(self._routers)}/v1/{path}", **content)
                if response.status_code < httpx.codes.INTERNAL_SERVER_ERROR or time.monotonic() > ends:
                    return response.raise_for_status()
            except httpx.TransportError:
                if time.monotonic() > ends:
                    raise
            time.sleep(_POLL)


def _outputs(line: dict[str, Any]) -> dict[str, int]:
    """The numbers that a run answered."""
    return {output["name"]: output["data"][0] for output in line["response"]["body"]["outputs"]}


def _text(number: int) -> dict[str, Any]:
    return {"model": MODEL, "input": f"Text number {number}."}


def _walk(number: int) -> dict[str, Any]:
    return {"inputs": [{"name": "number", "datatype": "INT64", "shape": [1], "data": [number]}]}
