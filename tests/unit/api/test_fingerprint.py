"""Requests that ask the same have one digest in whatever form they come, and others another one."""

from typing import Any

import msgspec
import numpy as np
import pytest

from api.inference.protocol import read_infer, request_of
from tasks.models.folder import load_catalogue
from tasks.models.signature import digest_of
from tasks.settings import TREE
from taxiway.contract.request import Request
from taxiway.contract.tensors import body, encode_inputs
from taxiway.contract.values import Blobs, to_wire
from taxiway.contract.wire import read_request, request_body

CATALOGUE = load_catalogue(TREE / "models")


def forms(model: str, inputs: Any) -> list[Request]:
    """One request as the interfaces read it."""
    specs = [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in CATALOGUE.resolve(model).inputs]
    framed = body({}, encode_inputs(specs, inputs)[0])
    content = b"".join(framed.pieces)
    asked = Request(model=model, inputs=inputs)
    plain = msgspec.structs.replace(asked, inputs=to_wire(inputs))
    return [
        asked,
        plain,
        read_request(request_body(asked, Blobs(limit=8)), "application/json"),
        read_request(request_body(asked), "application/json"),
        request_of(model, read_infer(content, dict(framed.headers).get("inference-header-content-length"))),
    ]


PIXELS = np.arange(224 * 224 * 3, dtype=np.float32).reshape(1, 224, 224, 3)
TWO_RUNS = {name: np.array([1, 2]) for name in ("sweeps", "size", "seed")} | {"temperature": np.array([2.0, 2.5])}


@pytest.mark.cases("model, inputs", [("ising", TWO_RUNS)])
def test_a_request_has_one_digest_at_every_interface(model: str, inputs: Any) -> None:
    found = CATALOGUE.resolve(model)
    assert len({digest_of(found, request) for request in forms(model, inputs)}) == 1


def test_what_matters_to_the_answer_changes_the_digest_and_how_soon_it_comes_does_not() -> None:
    def digest(model: str = "echo", inputs: Any = "hello", **terms: Any) -> str:
        return digest_of(CATALOGUE.resolve(model), Request(model=model, inputs=inputs, **terms))

    same = [digest(), digest("echo:1"), digest(deadline=3.0, priority="high", service="bulk"), digest(budget=1.0)]
    assert len(set(same)) == 1
    others = [digest(inputs="hullo"), digest("paced"), digest(locality="edge"), digest(min_accuracy=0.5)]
    others += [digest(inputs={"payload": ["hello", "hello"]}), digest(inputs=[["hello"]]), digest(inputs=None)]
    assert len({*same, *others}) == 1 + len(others)


def test_malformed_inputs_have_a_digest_as_well() -> None:
    model = CATALOGUE.resolve("ising")
    odd = [{"sweeps": "x"}, {"other": 1}, [[1], [2, 3]], {"sweeps": {"shape": 1, "datatype": 2, "data": 3}}, 2**70]
    assert len({digest_of(model, Request(model="ising", inputs=inputs)) for inputs in odd}) == len(odd)
