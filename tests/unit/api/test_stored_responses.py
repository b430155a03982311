"""What a stored response becomes when its job has ended."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from api.inference.infer import Inference
from api.openai.answers import AnswerHead
from api.openai.requests import read_call
from api.openai.responses.response import ResponseCall, StoredResponse, begun
from api.openai.responses.stored import Responses
from tasks.models.model import parse_model
from tasks.queues.limits import Limits
from taxiway.contract.job import Result, success_meta
from taxiway.contract.values import ResultBlobs, to_wire
from taxiway.errors import BrokerUnavailableError
from tests.builders import ENGINE_MODELS, a_report

AWAY = BrokerUnavailableError("the state store does not answer")
REPORT = a_report()


class Store:
    """A state store that keeps one response, and has no blobs or does not answer."""

    def __init__(self) -> None:
        asked = read_call(b'{"model": "talk", "input": "x", "background": true}', ResponseCall, Limits())
        response = begun(asked.call, parse_model(ENGINE_MODELS["talk"], "model.yaml"), AnswerHead("j", "default", 1))
        stored = StoredResponse(tenant="t", input=[], earlier=[], response=response)
        self.kept = msgspec.json.encode(stored)
        self.blobs_of: dict[str, bytes] | None = None
        self.responses = Responses(Inference(cast(Any, self._router())), cast(Any, self))

    def _router(self) -> SimpleNamespace:
        rules = SimpleNamespace(topology=SimpleNamespace(limits=Limits()), seal_keys=None)
        registry = SimpleNamespace(announce=self._announced)
        store = SimpleNamespace(clock=SimpleNamespace(now=lambda: 2.0))
        return SimpleNamespace(rules=rules, store=store, registry=registry, values=self)

    async def _announced(self, *_: Any) -> None:
        pass

    async def blobs(self, refs: list[str]) -> dict[str, bytes]:
        if self.blobs_of is None:
            raise AWAY
        return {ref: self.blobs_of[ref] for ref in refs}

    async def get(self, *_: Any) -> bytes:
        return self.kept

    async def change(self, kind: str, name: str, tenant: str | None, changed: Any) -> bytes:
        self.kept = msgspec.json.encode(changed(self.kept))
        return self.kept

    async def close_response(self, name: str) -> None:
        pass

    @property
    def status(self) -> str:
        return msgspec.json.decode(self.kept, type=StoredResponse).response.status


def test_a_response_whose_large_outputs_cannot_be_read_now_is_left_open_and_completes_later() -> None:
    store, blobs = Store(), ResultBlobs(16)
    message = {"role": "assistant", "content": "one two " * 8}
    outputs = to_wire({"message": message, "text": b"one two " * 8, "finish-reason": "stop"}, blobs=blobs)
    meta = success_meta("j", Result(model="talk:1", outputs=outputs, report=REPORT))
    assert blobs.contents
    with pytest.raises(BrokerUnavailableError):
        asyncio.run(store.responses._settle("resp_j", meta))
    assert store.status == "queued"
    store.blobs_of = {ref: bytes(content) for ref, content in blobs.contents.items()}
    asyncio.run(store.responses._settle("resp_j", meta))
    assert store.status == "completed"
