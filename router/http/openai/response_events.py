"""A response as server-sent events, as its job's answer is generated. Pure.

Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import msgspec

from router.http.openai.responses import Item, Response, failed, message_item, output_of, succeeded, text_part
from taxiway.contract.job import Result
from taxiway.errors import TaxiwayError

_encode = msgspec.json.Encoder().encode


class ResponseWriter:
    """Writes a response as events. Each has the number after its predecessor's."""

    def __init__(self, response: Response) -> None:
        self.response = response
        self._numbers = count()
        self._text = ""
        self._spoke = False

    def begin(self) -> bytes:
        """See `answers.Writer`."""
        states = ["created", "queued" if self.response.background else "in_progress"]
        return b"".join(self._event(f"response.{state}", response=self.response) for state in states)

    def piece(self, text: str) -> bytes:
        """See `answers.Writer`."""
        head = b"" if self._spoke else self._begin_message()
        self._text += text
        place = self._place(0)
        return head + self._event("response.output_text.delta", **place, delta=text, logprobs=[])

    def finish(self, result: Result, now: int) -> Response:
        """The whole response, whose items are in the order in which they began."""
        items = output_of(self.response.job, result)
        if self._spoke:
            items.sort(key=lambda item: item["type"] != "message")
        self.response = succeeded(self.response, result, now, items)
        return self.response

    def ending(self, result: Result) -> bytes:
        """See `answers.Writer`; after `finish`."""
        events = [self._item(index, item) for index, item in enumerate(self.response.output)]
        return b"".join(events) + self._event(f"response.{self.response.status}", response=self.response)

    def failed(self, error: TaxiwayError, path: str) -> bytes:
        """See `answers.Writer`."""
        return self._event("response.failed", response=failed(self.response, error))

    def _begin_message(self) -> bytes:
        self._spoke = True
        item = {**message_item(self.response.job, []), "status": "in_progress"}
        place = self._place(0)
        return self._event("response.output_item.added", output_index=0, item=item) + self._event(
            "response.content_part.added", **place, part=text_part("")
        )

    def _place(self, index: int) -> dict[str, Any]:
        return {"item_id": f"msg_{self.response.job}", "output_index": index, "content_index": 0}

    def _item(self, index: int, item: Item) -> bytes:
        """The events that are left of an item, when all of it is known."""
        told = {"message": self._rest_of_message, "function_call": self._function_call}.get(item["type"])
        before = b""
        if not (item["type"] == "message" and self._spoke):
            empty = {**item, "status": "in_progress", **_EMPTY.get(item["type"], {})}
            before = self._event("response.output_item.added", output_index=index, item=empty)
        middle = b"" if told is None else told(index, item)
        return before + middle + self._event("response.output_item.done", output_index=index, item=item)

    def _rest_of_message(self, index: int, item: Item) -> bytes:
        part, place = item["content"][0], self._place(index)
        added = b"" if self._spoke else self._event("response.content_part.added", **place, part=_emptied(part))
        if part["type"] == "refusal":
            said = self._event("response.refusal.delta", **place, delta=part["refusal"])
            said += self._event("response.refusal.done", **place, refusal=part["refusal"])
        else:
            said = self._event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
        return added + said + self._event("response.content_part.done", **place, part=part)

    def _function_call(self, index: int, item: Item) -> bytes:
        place, kind = {"item_id": item["id"], "output_index": index}, "response.function_call_arguments"
        delta = self._event(f"{kind}.delta", **place, delta=item["arguments"])
        return delta + self._event(f"{kind}.done", **place, name=item["name"], arguments=item["arguments"])

    def _event(self, kind: str, **fields: Any) -> bytes:
        content = _encode({"type": kind, "sequence_number": next(self._numbers), **fields})
        return b"event: " + kind.encode() + b"\ndata: " + content + b"\n\n"


_EMPTY: Mapping[str, dict[str, Any]] = {"message": {"content": []}, "function_call": {"arguments": ""}}


def _emptied(part: Item) -> Item:
    return {**part, part["type"].removeprefix("output_"): ""}
