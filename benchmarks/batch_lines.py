"""How fast does a batch of OpenAI's API go, and what does it cost live chats beside it and the router's memory?

`python -m benchmarks.batch_lines` starts one Valkey, a router, a cpu.batch worker for embeddings, and llama.cpp as an
engine for chats. It times live chats by HTTP, first alone, then beside a batch with one short text a line, checks that
every line is answered once, and compares the batch's rate with that of the model in a plain loop in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.engines import ENGINE
from benchmarks.measure import answer, percentile, say
from benchmarks.processes import fleet
from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.settings import TREE, cache_directory
from tests.llama import NAME, llama_server
from workers.port import Placed, open_pipeline, open_runtime

ROWS, SLOTS, VARIANT = 16, 4, "onnx-int8"

_QUEUES = (
    "hardware:"
    + ENGINE
    + """  cpu.batch:
    device: cpu
    runtimes: [onnx]
    max_batch: {rows}
    max_wait: 0.005
    price: {{usd_per_hour: 0.05}}
    warm: [embed]
service:
  live: {{deadline: 20, priority: high, tier: default}}
  bulk: {{deadline: 3600, priority: low, tier: flex}}
default_service: live
"""
)
_ENDED = ("completed", "failed", "expired", "cancelled")

EVERY, ALONE = 0.4, 30.0
"""Seconds between two live chats, and for which they are timed alone."""


def main() -> None:
    """Measure, and print one JSON line for each figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_lines", description=__doc__)
    parser.add_argument("--lines", type=int, default=10_000, help="lines of the batch")
    parser.add_argument("--padding", type=int, default=0, help="spaces in each line, for a larger file")
    given = parser.parse_args()
    workers = [["--class", "cpu.batch", "--device", "cpu:0"], ["--class", "engine", "--device", "endpoint:0"]]
    with tempfile.TemporaryDirectory() as name, llama_server(SLOTS) as url:
        queues = Path(name) / "queues.yaml"
        queues.write_text(_QUEUES.format(url=f"{url}/v1", slots=SLOTS, name=NAME, rows=ROWS))
        with fleet(Path(name), queues, workers) as doors:
            router = psutil.Process(doors.processes["router"][0])
            with httpx.Client(base_url=f"{doors.http}/v1", timeout=60, trust_env=False) as http:
                _run(http, router, 100, 0)  # the model is loaded, and the router has seen a batch
                alone = Live(f"{doors.http}/v1")
                time.sleep(ALONE)
                before = alone.end()
                beside = Live(f"{doors.http}/v1")
                rate, memory = _run(http, router, given.lines, given.padding)
                during = beside.end()
    limit = _loop_rate()
    say(answer("live chats alone, seconds", before, p99=percentile(before, 99)))
    say(answer("live chats beside the batch, seconds", during, p99=percentile(during, 99)))
    say(answer("batch of embeddings, lines/s", [rate], lines=given.lines, loop=limit, share=rate / limit))
    say(answer("batch of embeddings, router's memory at most less before, MiB", [memory], lines=given.lines))


class Live:
    """Chats of eight tokens, one after the other on a thread, until `end`, which returns the seconds of each."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._taken: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._call)
        self._thread.start()

    def end(self) -> list[float]:
        """Stop, and tell how long each chat took."""
        self._over.set()
        self._thread.join()
        return self._taken

    def _call(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60, trust_env=False) as http:
            while not self._over.wait(EVERY):
                messages = [{"role": "user", "content": f"Say the number {len(self._taken)}."}]
                began = time.perf_counter()
                asked = {"model": "chat", "messages": messages, "max_tokens": 8, "temperature": 0}
                http.post("/chat/completions", json=asked).raise_for_status()
                self._taken.append(time.perf_counter() - began)


def _run(http: httpx.Client, router: psutil.Process, lines: int, padding: int) -> tuple[float, float]:
    """Lines a second of a batch of so many lines, and by how many MiB the router's memory grew at most."""
    before = most = router.memory_info().rss
    content = "\n".join(json.dumps(_line(number)) + " " * padding for number in range(lines)).encode()
    form: Any = {"data": {"purpose": "batch"}, "files": {"file": ("lines.jsonl", content)}}
    file = http.post("/files", **form).raise_for_status().json()["id"]
    began = time.perf_counter()
    asked = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    batch = http.post("/batches", json=asked).raise_for_status().json()
    while batch["status"] not in _ENDED:
        time.sleep(0.25)
        most = max(most, router.memory_info().rss)
        batch = http.get(f"/batches/{batch['id']}").raise_for_status().json()
    rate = lines / (time.perf_counter() - began)
    output = http.get(f"/files/{batch['output_file_id']}/content").raise_for_status().text.splitlines()
    answered = Counter(json.loads(line)["custom_id"] for line in output)
    if answered != Counter(f"line-{number}" for number in range(lines)):
        raise RuntimeError(f"{batch['status']}: {len(answered)} of {lines} lines are answered")
    for name in (file, batch["output_file_id"]):
        http.delete(f"/files/{name}").raise_for_status()
    return rate, (most - before) / 2**20


def _loop_rate(seconds: float = 5.0) -> float:
    """Texts a second of the model alone in a loop, with one thread and full batches."""
    model = load_catalogue(TREE / "models").resolve("embed")
    variant = model.variants[VARIANT]
    files = ArtefactStore(cache_directory(os.environ)).files(model, VARIANT)
    placed = Placed(VARIANT, variant.precision, variant.entry, files, "cpu", 1, folder=model.folder)
    runtime, pipeline = open_runtime(variant.runtime, placed), open_pipeline(model, variant, placed)
    runtime.load()
    (field,) = (spec.name for spec in model.inputs)
    parameters = {name: parameter.default for name, parameter in model.parameters.items()}
    done, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        texts = [_line(done + number)["body"]["input"] for number in range(ROWS)]
        pipeline.run(runtime, [pipeline.prepare({field: text}, parameters) for text in texts])
        done += ROWS
    return done / (time.perf_counter() - began)


def _line(number: int) -> dict[str, Any]:
    body = {"model": "embed", "input": f"Text number {number} of a batch."}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/embeddings", "body": body}


if __name__ == "__main__":
    main()
