"""A response as server-sent events, as its job's answer is generated. Pure.

A `sequence_number` states how much of the response was sent: it grows by one with each event and each character of a
text. So it is the same for every reader, however the answer was cut into events, and one that comes back gets the rest.

Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from api.openai.answers import MessagePart
from api.openai.responses.response import (
    Item,
    Response,
    call_item,
    failed,
    message_item,
    output_of,
    parts_of,
    reasoning_item,
    restarted,
    succeeded,
)
from taxiway.contract.job import Result
from taxiway.contract.stream import Delta, SentMessage
from taxiway.errors import TaxiwayError

_encode = msgspec.json.Encoder().encode


class ResponseWriter:
    """Writes a response as events, those after the number `after`."""

    def __init__(self, response: Response, after: int = -1) -> None:
        self.response = response
        self._after = after
        self._number = 0
        self._message = SentMessage()
        self._begun: dict[str, int] = {}  # ids of items with their places

    def begin(self) -> bytes:
        """As `ChunkWriter` does."""
        states = ["created", "queued" if self.response.background else "in_progress"]
        return b"".join(self._event(f"response.{state}", response=self.response) for state in states)

    def part(self, part: MessagePart) -> bytes:
        """As `ChunkWriter` does."""
        self._message.add(part.delta)
        return b"".join(self._grown(part.delta))

    def finish(self, result: Result, now: int) -> Response:
        """The whole response, whose items are in the order in which they began."""
        items = output_of(self.response.job, result)
        items.sort(key=lambda item: self._begun.get(item["id"], len(items)))
        self.response = succeeded(self.response, result, now, items)
        return self.response

    def ending(self, result: Result) -> bytes:
        """As `ChunkWriter` does; after `finish`."""
        return self.end(self.response)

    def end(self, response: Response) -> bytes:
        """What follows the last part of a response."""
        events = [self._item(item) for item in response.output]
        self._number = max(self._number, self._after + 1)  # a reader gets the end wherever it resumes
        state = "failed" if response.status == "cancelled" else response.status
        return b"".join(events) + self._event(f"response.{state}", response=response)

    def failed(self, error: TaxiwayError, path: str) -> bytes:
        """As `ChunkWriter` does."""
        return self.end(failed(self.response, error))

    def _grown(self, delta: Delta) -> Iterator[bytes]:
        """The events of a delta: reasoning before text, and calls after it."""
        job = self.response.job
        if text := delta.get("reasoning_content"):
            item = reasoning_item(job, "")
            yield self._begin(item) + self._delta("response.reasoning_text", item, text, content_index=0)
        if text := delta.get("content"):
            item = message_item(job, parts_of({}))
            entries = [*(delta.get("logprobs") or ())]
            yield self._begin(item) + self._delta("response.output_text", item, text, entries, content_index=0)
        if (text := delta.get("refusal")) and not self._message.text("content"):
            item = message_item(job, parts_of({"refusal": " "}))
            yield self._begin(item) + self._delta("response.refusal", item, text, content_index=0)
        for call in delta.get("tool_calls") or ():
            yield self._called(call.get("index", 0), (call.get("function") or {}).get("arguments") or "")

    def _called(self, index: int, arguments: str) -> bytes:
        item, begin = call_item(self.response.job, index, {}), b""
        if item["id"] not in self._begun:  # joining its pieces at each delta would take quadratic time
            begin = self._begin({**call_item(self.response.job, index, self._message.call(index)), "arguments": ""})
        return begin + (self._delta("response.function_call_arguments", item, arguments) if arguments else b"")

    def _begin(self, item: Item) -> bytes:
        """The events that begin an item, unless it has begun."""
        if item["id"] in self._begun:
            return b""
        place = self._begun[item["id"]] = len(self._begun)
        parts: Sequence[Item] = item.get("content") or ()
        empty = {**item, "status": "in_progress", **({"content": []} if "content" in item else {})}
        added = self._event("response.output_item.added", output_index=place, item=empty)
        for index, part in enumerate(parts):
            where = {"item_id": item["id"], "output_index": place, "content_index": index}
            added += self._event("response.content_part.added", **where, part=_emptied(part))
        return added

    def _item(self, item: Item) -> bytes:
        """The events that end an item."""
        begin = self._begin({**item, "arguments": ""} if "arguments" in item else item)
        place = {"item_id": item["id"], "output_index": self._begun[item["id"]]}
        ends = [self._part(part, {**place, "content_index": n}) for n, part in enumerate(item.get("content") or ())]
        if item["type"] == "function_call":
            call = {"name": item["name"], "arguments": item["arguments"]}
            ends.append(self._event("response.function_call_arguments.done", **place, **call))
        done = self._event("response.output_item.done", output_index=place["output_index"], item=item)
        return begin + b"".join(ends) + done

    def _part(self, part: Item, place: Mapping[str, Any]) -> bytes:
        """The events that end a part of an item."""
        kind = part["type"]
        content = {key: part[key] for key in ("text", "refusal", "logprobs") if key in part}
        return self._event(f"response.{kind}.done", **place, **content) + self._event(
            "response.content_part.done", **place, part=part
        )

    def _delta(self, kind: str, item: Item, text: str, logprobs: Sequence[Any] | None = None, **place: Any) -> bytes:
        """The new part of a text, as far as it is after the requested number."""
        self._number += len(text) - 1
        more = text[-max(self._number - self._after, 0) :] if self._number > self._after else ""
        beside = {} if logprobs is None else {"logprobs": logprobs if more == text else []}
        where = {"item_id": item["id"], "output_index": self._begun[item["id"]], **place}
        return self._event(f"{kind}.delta", **where, delta=more, **beside)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        if number <= self._after:
            return b""
        content = _encode({"type": kind, "sequence_number": number, **fields})
        return b"event: " + kind.encode() + b"\ndata: " + content + b"\n\n"


def replay(response: Response, after: int) -> bytes:
    """All events of a response that has ended, after the number `after`."""
    writer = ResponseWriter(restarted(response), after)
    events = [writer.begin(), *(writer.part(MessagePart(0, delta)) for delta in _deltas(response.output))]
    return b"".join(events) + writer.end(response)


def _deltas(output: Sequence[Item]) -> Iterator[Delta]:
    """A response's output as events, item by item."""
    calls = 0
    for item in output:
        if item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            yield {"tool_calls": [{"index": calls, "id": item["call_id"], "function": function}]}
            calls += 1
        for part in item.get("content") or ():
            yield {_DELTAS[part["type"]]: part.get("text") or part.get("refusal"), "logprobs": part.get("logprobs")}


_DELTAS = {"reasoning_text": "reasoning_content", "output_text": "content", "refusal": "refusal"}


def _emptied(part: Item) -> Item:
    empty = {"text": "", "refusal": "", "logprobs": []}
    return {**part, **{key: empty[key] for key in part.keys() & empty.keys()}}
