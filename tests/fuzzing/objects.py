"""Numbers, files, batches and stored responses that no caller means, to a router and the workers behind it.

`python -m tests.fuzzing.objects --seconds 60` fails where a request holds the router's loop for over 100 ms (the least
of three attempts, in processor time: `tests.ticking`), is answered with a 500, or gets back what it sent; where the
router or a worker grows by more than `MEMORY`, or a worker ends; and where a batch does not end.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from tests.builders import add_engine_models, recorded
from tests.engine import Engine, serving
from tests.fuzzing.growth import Growth
from tests.fuzzing.malformed import NUMBERS
from tests.fuzzing.session import a_store, asked, options, say
from tests.routing import eventually
from tests.ticking import Stalls, ticking_router
from tests.working import worker_process, worker_settings

MEMORY = 256 * 2**20
"""Bytes by which the router may grow, with the bodies below, and a worker."""

ENDED = ("completed", "failed", "expired", "cancelled")
TIMEOUT = 120.0
"""Seconds in which the last batches end."""

LARGE = 8 * 2**20

QUEUES = recorded("fleets/objects.yaml")

_MESSAGES = b'"messages":[{"role":"user","content":"a"}]'
_CALLS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "/v1/chat/completions": (
        b'"model":"talk",' + _MESSAGES,
        ("max_tokens", "max_completion_tokens", "n", "seed", "temperature", "top_p", "top_logprobs", "logit_bias"),
    ),
    "/v1/completions": (b'"model":"tale","prompt":"a"', ("max_tokens", "n", "best_of", "logprobs", "seed", "echo")),
    "/v1/embeddings": (b'"model":"vector","input":"a"', ("dimensions", "encoding_format", "user")),
    "/v1/responses": (b'"model":"talk","input":"a"', ("max_output_tokens", "temperature", "top_logprobs", "store")),
}
"""What each call has at least, and fields that are numbers, or are said to be."""

_LINES = (b"", b"\n", b"{}", b"null", b"[" * 5000, b"\xff\xfe", b'{"custom_id":"a"}', b" " * 1000, b"x" * 100_000)


class Objects:
    """An endless supply of requests, the same for the same seed and answers."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.files, self.batches, self.responses = ["file-none"], list[str](), ["resp_none"]

    def request(self) -> dict[str, Any]:
        """One more: arguments of `httpx.Client.request`."""
        return self._chance.choice((self._call, self._call, self._file, self._batch, self._lists, self._other))()

    def _body(self, path: str) -> bytes:
        least, fields = _CALLS[path]
        odd = [b'"%s":%s' % (name.encode(), self._chance.choice(NUMBERS)) for name in self._chance.sample(fields, 2)]
        del odd[self._chance.randrange(1, 3) :]
        if self._chance.random() < 0.05:
            odd.append(b'"%s":"%s"' % (self._chance.choice((b"user", b"stop", b"seed")), b"u" * LARGE))
        return b"{" + b",".join([least, *odd]) + b"}"

    def _call(self) -> dict[str, Any]:
        path = self._chance.choice(sorted(_CALLS))
        headers = {"content-type": "application/json"}
        return {"method": "POST", "url": path, "content": self._body(path), "headers": headers}

    def _line(self, number: int) -> bytes:
        if self._chance.random() < 0.3:
            return self._chance.choice(_LINES)
        path = "/v1/chat/completions"
        return b'{"custom_id":"%d","method":"POST","url":"%s","body":%s}' % (number, path.encode(), self._body(path))

    def _file(self) -> dict[str, Any]:
        kind = self._chance.random()
        if kind < 0.1:
            content = b"\n" * LARGE
        elif kind < 0.2:
            content = b'{"custom_id":"' + b"c" * LARGE
        else:
            content = b"\n".join(self._line(number) for number in range(self._chance.randrange(30)))
        return {"method": "POST", "url": "/v1/files", "files": {"file": ("f", content)}, "data": {"purpose": "batch"}}

    def _batch(self) -> dict[str, Any]:
        length = self._chance.choice((0, 1, 16, 17, 1000))
        metadata = {str(n): "m" * self._chance.choice((0, 512, 513, 100_000)) for n in range(min(length, 40))}
        batch = {"input_file_id": self._chance.choice(self.files), "endpoint": "/v1/chat/completions"}
        asked = {**batch, "completion_window": "24h", "metadata": metadata}
        return {"method": "POST", "url": "/v1/batches", "json": asked}

    def _lists(self) -> dict[str, Any]:
        limit = self._chance.choice(("-1", "0", "1", "100", "10000", "9" * 400, "x"))
        return {"method": "GET", "url": f"/v1/{self._chance.choice(('files', 'batches'))}", "params": {"limit": limit}}

    def _other(self) -> dict[str, Any]:
        of = {"files": self.files, "batches": self.batches or ["batch_none"], "responses": self.responses}
        kind = self._chance.choice(sorted(of))
        path = f"/v1/{kind}/{self._chance.choice(of[kind])}"
        return {"method": self._chance.choice(("GET", "GET", "DELETE")), "url": path}

    def learn(self, request: dict[str, Any], answer: httpx.Response) -> None:
        """Remember the objects that an answer names, for the requests to come."""
        known = {"/v1/files": self.files, "/v1/batches": self.batches, "/v1/responses": self.responses}
        if request["method"] == "POST" and answer.is_success and request["url"] in known:
            known[request["url"]].append(answer.json()["id"])


def ask(http: httpx.Client, stalls: Stalls, supply: Objects) -> tuple[str, list[str]]:
    """Send a request; what it was answered, and what is wrong with that."""
    request = supply.request()
    answers, faults = asked(stalls, lambda: http.request(**request))
    for answer in answers:
        supply.learn(request, answer)
    about = f"{request['method']} {request['url'].rpartition('/v1/')[2].partition('/')[0]}"
    return f"{about} {answers[-1].status_code}", [f"{about}: {fault}" for fault in faults]


def unfinished(http: httpx.Client, batches: list[str]) -> list[str]:
    """The batches that have not ended, and were not deleted, within `TIMEOUT`."""
    end, left = time.monotonic() + TIMEOUT, batches
    while left and time.monotonic() < end:
        answers = {batch: http.get(f"/v1/batches/{batch}") for batch in left}
        left = [batch for batch, one in answers.items() if one.is_success and one.json()["status"] not in ENDED]
    return [f"a batch is {json.dumps(http.get(f'/v1/batches/{batch}').json())[:300]}" for batch in left]


def run(folder: Path, seconds: float, seed: int) -> tuple[Counter[str], list[str]]:
    """Ask for some seconds; what was answered, and what went wrong."""
    supply, counts, faults, engine = Objects(seed), Counter[str](), list[str](), Engine()
    with a_store(folder) as base, serving(engine), ExitStack() as stack:
        settings = worker_settings(base, folder, QUEUES.replace("URL", engine.url))
        add_engine_models(settings.models, "talk", "tale", "vector")
        log = stack.enter_context((folder / "log").open("wb"))
        worker = stack.enter_context(worker_process(settings, log=log)).process
        router, stalls = stack.enter_context(ticking_router(settings, folder, log, ["--files", str(folder / "files")]))
        http = stack.enter_context(httpx.Client(base_url=router.http, timeout=60, trust_env=False))
        eventually(lambda: http.get("/v2/models/talk/ready").is_success, within=60)
        growths = {"the router": Growth(router.process.pid), "the worker": Growth(worker.pid)}
        for growth in growths.values():
            stack.enter_context(growth)
        end = time.monotonic() + seconds
        while time.monotonic() < end and router.process.poll() is None:
            answered, wrong = ask(http, stalls, supply)
            counts[answered] += 1
            faults += [f"request {counts.total()}: {fault}" for fault in wrong]
        faults += unfinished(http, supply.batches)
        faults += [f"{name} grew by {one.most / 2**20:.0f} MiB" for name, one in growths.items() if one.most > MEMORY]
        processes = {"router": router.process, "worker": worker}
        faults += [f"the {name} ended" for name, one in processes.items() if one.poll() is not None]
    return counts, faults


def main() -> int:
    """Run; 1 where a request did harm."""
    given = options("objects", __doc__, seconds=60)
    with tempfile.TemporaryDirectory() as name:
        return say(given.seed, *run(Path(name), given.seconds, given.seed))


if __name__ == "__main__":
    sys.exit(main())
