"""How many lines a second does a batch of OpenAI's API answer, and how much does its router's memory grow?

`python -m benchmarks.batch_lines` starts one Valkey, a router and one cpu.batch worker, uploads a file of embeddings
with one short text a line, and waits for its batch. It checks that every line is answered once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.measure import answer, say
from benchmarks.processes import fleet

_QUEUES = """
hardware:
  cpu.batch: {device: cpu, runtimes: [onnx], max_batch: 16, max_wait: 0.005, price: {usd_per_hour: 0.05}, warm: [embed]}
service: {standard: {deadline: 5}}
default_service: standard
"""
_ENDED = ("completed", "failed", "expired", "cancelled")


def main() -> None:
    """Measure, and print one JSON line for each figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_lines", description=__doc__)
    parser.add_argument("--lines", type=int, default=10_000, help="lines of the batch")
    given = parser.parse_args()
    workers = [["--class", "cpu.batch", "--device", "cpu:0"]]
    with tempfile.TemporaryDirectory() as name:
        queues = Path(name) / "queues.yaml"
        queues.write_text(_QUEUES)
        with fleet(Path(name), queues, workers) as doors:
            router = psutil.Process(doors.processes["router"][0])
            with httpx.Client(base_url=f"{doors.http}/v1", timeout=60, trust_env=False) as http:
                _run(http, router, 100)  # the model is loaded, and the router has seen a batch
                rate, memory = _run(http, router, given.lines)
    say(answer("batch of embeddings, lines/s", [rate], lines=given.lines))
    say(answer("batch of embeddings, router's memory at most less before, MiB", [memory], lines=given.lines))


def _run(http: httpx.Client, router: psutil.Process, lines: int) -> tuple[float, float]:
    """Lines a second of a batch of so many lines, and by how many MiB the router's memory grew at most."""
    before = most = router.memory_info().rss
    content = "\n".join(json.dumps(_line(number)) for number in range(lines)).encode()
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


def _line(number: int) -> dict[str, Any]:
    body = {"model": "embed", "input": f"Text number {number} of a batch."}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/embeddings", "body": body}


if __name__ == "__main__":
    main()
