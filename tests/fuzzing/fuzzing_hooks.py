"""Hooks of schemathesis: most requests name what there is, so that they get further; in the end, what was answered."""

from __future__ import annotations

import atexit
import os
import sys
import zlib
from collections import Counter
from typing import Any

import schemathesis
from schemathesis.hooks import HookContext

RAW = "Inference-Header-Content-Length"
JOBS = os.environ["FUZZING_JOBS"].split()
OBJECTS = dict(one.split("=") for one in os.environ["FUZZING_OBJECTS"].split())
_answers: Counter[tuple[str, int]] = Counter()


def often(value: object) -> bool:
    """True for three values in four, always for the same ones."""
    return _number(value) % 4 > 0


@schemathesis.hook
def map_path_parameters(context: HookContext, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    if not parameters or not often(parameters):
        return parameters
    job = JOBS[_number(parameters) % len(JOBS)]
    there = {"model": "echo", "version": "1", "job": job, **OBJECTS}
    return {name: there.get(name, value) for name, value in parameters.items()}


@schemathesis.hook
def map_headers(context: HookContext, headers: dict[str, Any] | None) -> dict[str, Any] | Any:
    if not headers or not often(headers):
        return headers
    return {name: value for name, value in headers.items() if name != RAW and not name.startswith("X-Taxiway-")}


@schemathesis.hook
def map_body(context: HookContext, body: Any) -> Any:
    if isinstance(body, dict) and "model" in body and often(body):
        fields = {"messages": "talk", "prompt": "tale", "input": "vector"}
        model = next((model for name, model in fields.items() if name in body), "talk")
        named = {**body, "model": "talk" if context.operation.path == "/v1/responses" else model}
        return {**named, **_plain(named)} if often(named) else named
    inputs = body.get("inputs") if isinstance(body, dict) else None
    if not isinstance(inputs, list) or not often(body):
        return body
    known = {"inputs": [_known(tensor) for tensor in inputs[:1]]}
    return {**body, **known, **({"outputs": [], "parameters": {}} if often(inputs) else {})}


@schemathesis.hook
def after_call(context: HookContext, case: schemathesis.Case, response: schemathesis.Response) -> None:
    _answers[case.operation.label, response.status_code] += 1


def _plain(body: dict[str, Any]) -> dict[str, Any]:
    """What a call is about as a model takes it, and no tier."""
    kinds = {"messages": [{"role": "user", "content": "call=add:{} a"}], "prompt": ["a", "b"], "input": "a"}
    return {**{name: value for name, value in kinds.items() if name in body}, "service_tier": None}


def _known(tensor: Any) -> Any:
    if not isinstance(tensor, dict):
        return tensor
    data = tensor.get("data") or ["a"]
    data = [str(element) for element in data] if isinstance(data, list) and often(data) else data
    shape = [len(data)] if isinstance(data, list) and often(tensor) else tensor.get("shape", [])
    return {**tensor, "name": "payload", "datatype": "BYTES", "shape": shape, "data": data, "parameters": {}}


def _number(value: object) -> int:
    return zlib.crc32(repr(value).encode("utf-8", "surrogatepass"))


@atexit.register
def _tell() -> None:
    for (label, status), count in sorted(_answers.items()):
        sys.stderr.write(f"{label} {status}: {count}\n")
