"""Batches of OpenAI's API, which run through all faults: every line must be in an output or error file, once."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx

from tests.chaos.history import BatchRead, Recorder

MODEL = "embed"

TIMEOUT = 60.0
"""Seconds for which a call is tried again at another router."""

_ENDED = ("completed", "failed", "expired", "cancelled")
_POLL = 0.5


class Batches:
    """Runs batches of so many lines on a thread, one after the other, until `finish`; records how each ended.

    `left` is the number of lines without an answer as of the last look; 0 once the last batch has ended.
    """

    def __init__(self, routers: Sequence[str], lines: int, recorder: Recorder) -> None:
        self.left = self._lines = lines
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
            self.left, began = self._lines, time.time()
            try:
                self._recorder.record(self._run_one(began))
            except httpx.HTTPStatusError:  # its record is gone, which a failover may explain
                gone = BatchRead(
                    status="gone", began=began, lines=self._lines, answered=0, missing=self._lines, repeated=0
                )
                self._recorder.record(gone)
        self.left = 0

    def _run_one(self, began: float) -> BatchRead:
        batch = self._begin()
        while batch["status"] not in _ENDED and not self._given_up.wait(_POLL):
            batch = self._ask("GET", f"batches/{batch['id']}").json()
            counts = batch["request_counts"]
            self.left = max(self._lines - counts["completed"] - counts["failed"], 1)
        answered, failed = (self._read(batch.get(name)) for name in ("output_file_id", "error_file_id"))
        found = answered + failed
        return BatchRead(
            status=batch["status"],
            began=began,
            lines=self._lines,
            answered=len(answered),
            missing=sum(not found[_name(number)] for number in range(self._lines)),
            repeated=sum(count - 1 for count in found.values()),
        )

    def _begin(self) -> dict[str, Any]:
        content = "\n".join(json.dumps(_line(number)) for number in range(self._lines)).encode()
        file = self._ask("POST", "files", data={"purpose": "batch"}, files={"file": ("lines.jsonl", content)}).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
        begun: dict[str, Any] = self._ask("POST", "batches", json=asked).json()
        return begun

    def _read(self, file: str | None) -> Counter[str]:
        """How often each line is in a file."""
        text = "" if file is None else self._ask("GET", f"files/{file}/content").text
        return Counter(json.loads(line)["custom_id"] for line in text.splitlines())

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


def _name(number: int) -> str:
    return f"line-{number}"


def _line(number: int) -> dict[str, Any]:
    body = {"model": MODEL, "input": f"Text number {number}."}
    return {"custom_id": _name(number), "method": "POST", "url": "/v1/embeddings", "body": body}
