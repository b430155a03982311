"""How fast does a batch of OpenAI's API go, and what does it cost live chats beside it and the router's memory?

`python -m benchmarks.batch_lines` starts one Valkey, a router, a cpu.batch worker for embeddings, and llama.cpp as an
engine for chats, which run nowhere else. It times live chats by HTTP, first alone, then beside a batch with one short
text a line. It checks that every line is answered once, and compares the batch's rate with that of the model in a plain
loop in this process. It also tells how many cores each process used meanwhile, as live chats wait for them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.engines import ENGINE
from benchmarks.harness.measure import answer, percentile, say
from benchmarks.harness.processes import Interfaces, fleet
from benchmarks.suite.catalogue import write_catalogue
from benchmarks.suite.workloads import Workload
from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.settings import TREE, cache_directory
from tests.llama import NAME, llama_server
from workers.port import Placed, import_runtime, open_pipeline

ROWS, SLOTS, VARIANT = 16, 4, "onnx-int8"

_QUEUES = (
    "hardware:"
    + ENGINE
    + """    labels: [live]
  cpu.batch:
    device: cpu
    runtimes: [onnx]
    max_batch: {rows}
    max_wait: 0.005
    price: {{usd_per_hour: 0.05}}
    nice: {nice}
    warm: [embed]
service:
  live: {{deadline: 60, priority: high, tier: default}}
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
    parser.add_argument("--nice", type=int, default=10, help="nice of cpu.batch in queues.yaml")
    given = parser.parse_args()
    workers = [["--class", "cpu.batch", "--device", "cpu:0"], ["--class", "engine", "--device", "endpoint:0"]]
    with tempfile.TemporaryDirectory() as name, llama_server(SLOTS) as url:
        queues = Path(name) / "queues.yaml"
        queues.write_text(_QUEUES.format(url=f"{url}/v1", slots=SLOTS, name=NAME, rows=ROWS, nice=given.nice))
        models = Path(name) / "models"
        write_catalogue(models, [Workload("embed", "embeddings", "embed", VARIANT, ROWS, wait=0.005)])
        (models / "chat").symlink_to(TREE / "models" / "chat")
        with fleet(Path(name), queues, workers, models) as interfaces:
            rate = _measure(interfaces, given.lines, given.padding)
    limit = _loop_rate()
    say(answer("batch of embeddings, lines/s", [rate], loop=limit, share=rate / limit))


def _measure(interfaces: Interfaces, lines: int, padding: int) -> float:
    """Time live chats alone and beside a batch; the lines a second of the batch."""
    processes = _processes(interfaces)
    with httpx.Client(base_url=f"{interfaces.http}/v1", timeout=60, trust_env=False) as http:
        _Batch(http, 100, 0).end(processes["router"])  # the model is loaded, the router has seen a batch
        live = Live(f"{interfaces.http}/v1", processes)
        time.sleep(ALONE)
        _say_live("alone", live)
        batch = _Batch(http, lines, padding)
        live = Live(f"{interfaces.http}/v1", processes)
        batch.end(processes["router"])
        _say_live("beside a batch", live)
        batch.check()
    grown = [most - batch.memory[0] for most in batch.memory]
    say(answer("router's memory less before a batch, MiB", grown, most=max(grown), lines=lines))
    return lines / batch.seconds


def _say_live(where: str, live: Live) -> None:
    taken = live.end()
    say(answer(f"live chats {where}, seconds", taken, p99=percentile(taken, 99), cores=live.cores))


def _processes(interfaces: Interfaces) -> dict[str, psutil.Process]:
    """The processes that share the machine, by what they do."""
    (broker,), (router,), (embed, engine) = (interfaces.processes[role] for role in ("broker", "router", "worker"))
    server = next(one for one in psutil.Process().children() if "local.llama" in one.cmdline())
    numbers = {"valkey": broker, "router": router, "embed": embed, "engine's worker": engine, "engine": server.pid}
    return {name: psutil.Process(number) for name, number in {**numbers, "this": os.getpid()}.items()}


_ON_ENGINE = {"X-Taxiway-Locality": "live"}


class Live:
    """Chats of eight tokens, one after the other on a thread, until `end`, which returns the seconds of each.

    `cores` are those that each of the `processes` used meanwhile. The first chat is not counted.
    """

    def __init__(self, url: str, processes: Mapping[str, psutil.Process]) -> None:
        self.cores: dict[str, float] = {}
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._processes = processes
        self._taken: list[float] = []
        self._over = threading.Event()
        self._chat()
        self._began, self._before = time.perf_counter(), self._used()
        self._thread = threading.Thread(target=self._call)
        self._thread.start()

    def end(self) -> list[float]:
        """Stop, and tell how long each chat took."""
        self._over.set()
        self._thread.join()
        self._http.close()
        seconds = time.perf_counter() - self._began
        self.cores = {name: round((used - self._before[name]) / seconds, 2) for name, used in self._used().items()}
        return self._taken

    def _used(self) -> dict[str, float]:
        """Seconds of a core that each process has used."""
        return {name: sum(process.cpu_times()[:2]) for name, process in self._processes.items()}

    def _call(self) -> None:
        while not self._over.wait(EVERY):
            self._taken.append(self._chat())

    def _chat(self) -> float:
        messages = [{"role": "user", "content": f"Say the number {len(self._taken)}."}]
        began = time.perf_counter()
        asked = {"model": "chat", "messages": messages, "max_tokens": 8, "temperature": 0}
        self._http.post("/chat/completions", json=asked, headers=_ON_ENGINE).raise_for_status()
        return time.perf_counter() - began


class _Batch:
    """A batch of so many lines. `memory` has the router's in MiB, first before it, and `seconds` how long it took."""

    def __init__(self, http: httpx.Client, lines: int, padding: int) -> None:
        self.memory: list[float] = []
        self.seconds = 0.0
        self._http = http
        self._lines = lines
        content = "\n".join(json.dumps(_line(number)) + " " * padding for number in range(lines)).encode()
        form: Any = {"data": {"purpose": "batch"}, "files": {"file": ("lines.jsonl", content)}}
        self._file = http.post("/files", **form).raise_for_status().json()["id"]
        self._output = ""

    def end(self, router: psutil.Process) -> None:
        """Run it to its end."""
        began, asked = time.perf_counter(), {"endpoint": "/v1/embeddings", "completion_window": "24h"}
        self.memory.append(router.memory_info().rss / 2**20)
        batch = self._http.post("/batches", json={**asked, "input_file_id": self._file}).raise_for_status().json()
        while batch["status"] not in _ENDED:
            time.sleep(0.05)
            self.memory.append(router.memory_info().rss / 2**20)
            batch = self._http.get(f"/batches/{batch['id']}").raise_for_status().json()
        self.seconds = time.perf_counter() - began
        self._output = batch["output_file_id"]

    def check(self) -> None:
        """Every line is answered once."""
        with self._http.stream("GET", f"/files/{self._output}/content") as output:
            answered = Counter(json.loads(line)["custom_id"] for line in output.iter_lines())
        if answered != Counter(f"line-{number}" for number in range(self._lines)):
            raise RuntimeError(f"{len(answered)} of {self._lines} lines are answered")


def _loop_rate(seconds: float = 5.0) -> float:
    """Texts a second of the model alone in a loop, with one thread and full batches."""
    model = load_catalogue(TREE / "models").resolve("embed")
    variant = model.variants[VARIANT]
    files = ArtefactStore(cache_directory(os.environ)).files(model, VARIANT)
    placed = Placed(VARIANT, variant.precision, variant.entry, files, "cpu", 1, folder=model.folder)
    runtime, pipeline = import_runtime(variant.runtime)(placed), open_pipeline(model, variant, placed)
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
