"""An engine for tests: speaks OpenAI's API and some OIP over real sockets, and fails as its prompts ask it to.

The last message of a chat is what happens: the words that are said, with `wait=0.1` before each further one, or
`status=500`, `break` (the connection ends in the middle), `cut` (the stream ends early, properly), `endless`,
`garble`, `stall`.
`call=name:arguments` calls a function, `think=word` is reasoning, and `finish=length` the reason why it ended; `fill`
stands for as many words as the chat may have.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from tests.listening import listening

_HEAD = "HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{more}\r\n"


@dataclass
class Engine:
    """What it was asked, in order: path, headers and body.

    `begun` has the prompts of chats that it began, `aborts` when the connection of a prompt ended before its answer.
    `models` are those that it lists; those with `embed` in their name only embed. `script` replaces what prompts ask
    for, if it is set, and answers that it streams have the `headers`, and `usage` instead of what it counts. `faults`
    has what happens instead when a prompt comes for the first time, and `came` counts how often each came. Without
    `metrics` it has none.
    """

    port: int = 0
    models: list[str] = field(default_factory=lambda: ["served"])
    script: str = ""
    retry_after: str = ""
    metrics: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    begun: set[str] = field(default_factory=set)
    aborts: dict[str, float] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    came: Counter[str] = field(default_factory=Counter)
    running: int = 0
    most: int = 0
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/v1"

    @property
    def chats(self) -> list[Any]:
        """The bodies of the chats that it was asked for."""
        return [body for path, _, body in self.asked if path == "/v1/chat/completions"]

    def forget(self) -> None:
        """Be as at first, at the same address."""
        vars(self).update(vars(Engine(port=self.port, scheme=self.scheme)))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                path, headers = head[0].split(" ")[1], dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self._answer(path, headers, body, reader, writer):
                    break
        writer.close()

    async def _answer(
        self,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Answer one request; whether the connection goes on."""
        if not body and path in ("/v1/models", "/metrics", "/slots"):
            return await self._tell_of_itself(path, writer)
        if "/status=" in path:
            return await self._whole(writer, {"error": {"message": path}}, path.partition("=")[2])
        if path.startswith("/v2/"):
            return await self._infer(path, writer)
        asked = json.loads(body)
        self.asked.append((path, headers, asked))
        if path == "/v1/rerank":
            scores = [{"index": 0, "relevance_score": float(len(asked["documents"][0]))}]
            return await self._whole(writer, {"results": scores})
        if path == "/v1/embeddings":
            return await self._whole(writer, {"data": [{"embedding": [float(len(asked["input"])), 1.0]}]})
        prompt = asked["messages"][-1]["content"]
        self.came[prompt] += 1
        script = self.faults.pop(prompt, "") or self.script or prompt
        words = [word for one in script.split() for word in _meant(one, asked)]
        if words[0].startswith("status="):
            more = {"Retry-After": self.retry_after} if self.retry_after else {}
            return await self._whole(writer, {"error": {"message": script}}, words[0][7:], more)
        self.begun.add(prompt)
        with self._counted() as counted:
            telling = asyncio.ensure_future(self._tell(asked, words, writer, counted.close))
            hearing = asyncio.ensure_future(reader.read(1))
            telling.add_done_callback(_ended)
            hearing.add_done_callback(_ended)
            try:
                await asyncio.wait((telling, hearing), return_when=asyncio.FIRST_COMPLETED)
                if not telling.done():
                    self.aborts[prompt] = time.monotonic()
                    return False
                hearing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await hearing
                return telling.result()
            finally:
                telling.cancel()
                hearing.cancel()

    def _counted(self) -> contextlib.ExitStack:
        """Count a chat as running until this is closed."""

        def end() -> None:
            self.running -= 1

        self.running += 1
        self.most = max(self.most, self.running)
        stack = contextlib.ExitStack()
        stack.callback(end)
        return stack

    async def _tell_of_itself(self, path: str, writer: asyncio.StreamWriter) -> bool:
        if path == "/v1/models":
            embedding = [{"name": name, "capabilities": ["embedding"]} for name in self.models if "embed" in name]
            return await self._whole(writer, {"data": [{"id": name} for name in self.models], "models": embedding})
        return await self._whole(writer, self.metrics, "200" if self.metrics and path == "/metrics" else "404")

    async def _infer(self, path: str, writer: asyncio.StreamWriter) -> bool:
        """Answer a probe, or an OIP request of one row: always a half, or never if the script is `stall`."""
        if path == "/v2/repository/index":
            return await self._whole(writer, [{"name": name, "state": "READY"} for name in self.models])
        if path.removeprefix("/v2/models/") in self.models:
            tensor = {"datatype": "FP64", "shape": [-1]}
            described = {"inputs": [{"name": "x", **tensor}], "outputs": [{"name": "estimate", **tensor}]}
            return await self._whole(writer, described)
        if path.endswith("/infer"):
            self.begun.add(path)
            await asyncio.sleep(3600 if self.script == "stall" else 0)
        output = {"name": "estimate", "datatype": "FP64", "shape": [1], "data": [0.5]}
        return await self._whole(writer, {"outputs": [output]})

    async def _tell(
        self, asked: dict[str, Any], words: list[str], writer: asyncio.StreamWriter, done: Callable[[], None]
    ) -> bool:
        """Stream the words; `done` is called before the end is told, since the next chat may come at once then."""
        self._head(writer, "200", "text/event-stream", {"Transfer-Encoding": "chunked", **self.headers})
        wait, said, finish, called = 0.0, 0, "stop", count()
        for word in words:
            if word.startswith("wait="):
                wait = float(word[5:])
            elif word == "break":
                return False
            elif word == "cut":
                done()
                return await self._end(writer)
            elif word.startswith("finish="):
                finish = word[7:]
            elif word.startswith("call="):
                self._call(writer, next(called), *word[5:].split(":", 1))
            elif not await self._did(word, writer):
                await asyncio.sleep(wait if said else 0.0)
                stated = {"content": [{"token": f"{word} ", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
                more = {"logprobs": stated} if asked.get("logprobs") else {}
                self._event(writer, choices=[{"index": 0, "delta": {"content": f"{word} "}, **more}])
                said += 1
        done()
        self._event(writer, choices=[{"index": 0, "delta": {}, "finish_reason": finish}])
        usage = {"prompt_tokens": 3, "completion_tokens": said, "total_tokens": 3 + said, **self.usage}
        self._event(writer, choices=[], usage=usage)
        self._chunk(writer, b"data: [DONE]\n\n")
        return await self._end(writer)

    async def _did(self, word: str, writer: asyncio.StreamWriter) -> bool:
        """Do what a word asks for, if it does not stand for itself."""
        if word == "stall":
            await asyncio.sleep(3600)
        elif word == "endless":
            while True:
                self._event(writer, choices=[{"index": 0, "delta": {"content": "x" * 100_000}}])
                await writer.drain()
        elif word == "garble":
            self._chunk(writer, b"data: {nonsense\n\n")
        elif word.startswith("think="):
            self._event(writer, choices=[{"index": 0, "delta": {"reasoning_content": word[6:]}}])
        else:
            return False
        return True

    def _call(self, writer: asyncio.StreamWriter, index: int, name: str, arguments: str) -> None:
        """Call a function, with the arguments in two parts."""
        half = len(arguments) // 2
        named: dict[str, Any] = {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": ""}}
        parts = [{"function": {"arguments": part}} for part in (arguments[:half], arguments[half:])]
        for part in (named, *parts):
            self._event(writer, choices=[{"index": 0, "delta": {"tool_calls": [{"index": index, **part}]}}])

    def _event(self, writer: asyncio.StreamWriter, **fields: Any) -> None:
        self._chunk(writer, f"data: {json.dumps(fields)}\n\n".encode())

    def _chunk(self, writer: asyncio.StreamWriter, content: bytes) -> None:
        writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    async def _end(self, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _whole(
        self, writer: asyncio.StreamWriter, content: Any, status: str = "200", more: dict[str, str] | None = None
    ) -> bool:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self._head(writer, status, "application/json", {"Content-Length": str(len(body)), **(more or {})})
        writer.write(body)
        await writer.drain()
        return True

    def _head(self, writer: asyncio.StreamWriter, status: str, kind: str, more: dict[str, str]) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in more.items())
        writer.write(_HEAD.format(status=status, kind=kind, more=lines).encode())


def _meant(word: str, asked: dict[str, Any]) -> list[str]:
    """The word, or those that `fill` stands for."""
    if word != "fill":
        return [word]
    return [*(f"w{number}" for number in range(asked["max_tokens"])), "finish=length"]


def _ended(task: asyncio.Future[Any]) -> None:
    """Take notice of a task's error: a broken connection."""
    if not task.cancelled():
        task.exception()


@contextlib.contextmanager
def serving(engine: Engine, tls: ssl.SSLContext | None = None) -> Iterator[Engine]:
    """The engine on its port, a free one at first, until the context ends; it may then be served again."""
    with listening(engine.serve, engine.port, ssl=tls) as engine.port:
        engine.scheme = "http" if tls is None else "https"
        yield engine


def main(port: int) -> None:
    """Serve on a port until the process is ended."""
    with serving(Engine(port=port)):
        threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]))
