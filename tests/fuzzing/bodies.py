"""Bodies that are hard to read, and callers by other names, to a router whose event loop tells how long it stood still.

`python -m tests.fuzzing.bodies --seconds 60` fails where a request holds the loop for over 100 ms (the least of three
attempts, in processor time: `tests.ticking`), is answered with a 500, gets back what it sent, or comes by another
machine's name and is let in.
"""

import gzip
import json
import random
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.fuzzing.session import a_store, asked, options, say
from tests.routing import EchoDevice, eventually
from tests.ticking import Stalls, ticking_router

MOST = 16 * 2**20
"""Bytes of a body before it is compressed: `limits.payload`."""

_ELEMENTS = (
    b"1", b"0.5", b"-1e308", b"1" * 18, b"9" * 4000, b"null", b"true", b'""', b'"a"', b'"\\u00e9"', b"[]", b"{}",
    b'{"":0}', b"[[[]]]", b'{"a":[1,2,3]}', b'{"__type__":"base64","__value__":""}', b'{"shape":[1],"datatype":"FP32"}',
)  # fmt: skip
_LENGTHS = (0, 1, 2, 3, 10, 2**31, 2**32, 2**62, 2**63, 2**64, 10**18, 10**4200, -1)
_NAMES = ("example.org", "127.0.0.1.example.org", "10.0.0.1", "[::2]", "localhost.example.org", "a" * 250)
_OWN_NAMES = ("localhost", "127.0.0.1", "127.1.2.3", "[::1]")


class Bodies:
    """An endless supply of requests, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def request(self) -> dict[str, Any]:
        """One more: arguments of `httpx.Client.request`."""
        chance = self._chance
        path, content, headers = chance.choice((self._tensor, self._raw, self._parameters, self._odd))()
        coding = chance.choice(("", "", "", "gzip", "deflate", "br"))
        if coding:
            headers = {**headers, "content-encoding": coding}
            content = gzip.compress(content, 1) if coding == "gzip" else zlib.compress(content, 1)
        headers["host"] = chance.choice(_NAMES if chance.random() < 0.1 else _OWN_NAMES)
        return {"method": "POST", "url": path, "content": content, "headers": headers}

    def _many(self) -> bytes:
        """As many elements as a body of a random size holds."""
        element = self._chance.choice(_ELEMENTS)
        size = int(MOST * self._chance.random() ** 2)
        return b",".join([element] * max(size // (len(element) + 1), 1))

    def _path(self) -> str:
        return f"/v2/models/echo/{self._chance.choice(('infer', 'placement'))}"

    def _shape(self) -> list[int]:
        axes = self._chance.choice((0, 1, 1, 1, 2, 3, 32, 33, 100_000))
        return [self._chance.choice(_LENGTHS) for _ in range(axes)] if axes < 50 else [10**17] * axes

    def _tensor(self) -> tuple[str, bytes, dict[str, str]]:
        data = self._many()
        shape = [data.count(b",") + 1] if self._chance.random() < 0.5 else self._shape()
        kind = self._chance.choice(("BYTES", "FP32", "INT8", "X" * 1000))
        head = {"name": "payload", "shape": shape, "datatype": kind}
        return self._path(), b'{"inputs":[%s,"data":[%s]}]}' % (json.dumps(head)[:-1].encode(), data), {}

    def _raw(self) -> tuple[str, bytes, dict[str, str]]:
        content = bytes(int(MOST * self._chance.random() ** 2))
        shape = [len(content) // 4] if self._chance.random() < 0.5 else self._shape()
        parameters = {"binary_data_size": len(content)}
        head = {"name": "payload", "shape": shape, "datatype": self._chance.choice(("BYTES", "FP32"))}
        text = json.dumps({"inputs": [{**head, "parameters": parameters}]}).encode()
        return self._path(), text + content, {"inference-header-content-length": str(len(text))}

    def _parameters(self) -> tuple[str, bytes, dict[str, str]]:
        return self._path(), b'{"inputs":[],"parameters":{"a":[%s]},"id":"%s"}' % (self._many(), b"i" * 1000), {}

    def _odd(self) -> tuple[str, bytes, dict[str, str]]:
        size = int(MOST * self._chance.random() ** 2)
        piece = self._chance.choice((b"[", b'{"a":', b'"', b"\\u00e9", b"9", b"a", b"\xff", b"\0"))
        return self._path(), self._chance.choice((b"", b'{"', b'{"inputs":"', b"[")) + piece * (size // len(piece)), {}


def ask(http: httpx.Client, stalls: Stalls, request: dict[str, Any]) -> tuple[list[str], str]:
    """Send a request; what is wrong with its answer, and what it was answered."""
    answers, faults = asked(stalls, lambda: http.request(**request))
    status = answers[-1].status_code
    foreign = request["headers"]["host"] in _NAMES
    faults += ["it was let in by another name"] if foreign and status != httpx.codes.FORBIDDEN else []
    return faults, f"{request['url'].rpartition('/')[2]} {status}"


def main() -> int:
    """Run; 1 where a request did harm, or the router ended."""
    given = options("bodies", __doc__, seconds=60)
    supply, counts, faults = Bodies(given.seed), Counter[str](), list[str]()
    with (
        tempfile.TemporaryDirectory() as name,
        a_store(Path(name)) as settings,
        EchoDevice(settings),
        (Path(name) / "log").open("wb") as log,
        ticking_router(settings, Path(name), log) as (router, stalls),
        httpx.Client(base_url=router.http, timeout=60, trust_env=False) as http,
    ):
        eventually(lambda: http.get("/v2/health/ready").status_code == httpx.codes.OK)
        end = time.monotonic() + given.seconds
        while time.monotonic() < end and router.process.poll() is None:
            wrong, answered = ask(http, stalls, supply.request())
            counts[answered] += 1
            faults += [f"request {counts.total()}: {fault}" for fault in wrong]
        faults += ["the router ended"] if router.process.poll() is not None else []
    return say(given.seed, counts, faults)


if __name__ == "__main__":
    sys.exit(main())
