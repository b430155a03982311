"""Values of which a test names only the fields that it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.heartbeat import DeviceFacts
from tasks.models.model import Model, TensorSpec, Variant
from tasks.ticket import Ticket
from tasks.topology import HardwareClass, Price, Service, Topology
from taxiway.contract.keys import INFER
from workers.stages.job import Delivery

TEXT = TensorSpec(name="text", datatype="BYTES", shape=(-1,))


def a_ticket(job: str = "j", model: str = "echo:1", **fields: Any) -> Ticket:
    usual: dict[str, Any] = {
        "variants": {},
        "prices": {},
        "accepted": 0.0,
        "deadline_at": 0.0,
        "level": 1,
        "reason": "a test",
    }
    return Ticket(job=job, task=INFER, model=model, **(usual | fields))


def a_delivery(ticket: Ticket | None = None, body: bytes = b"", **fields: Any) -> Delivery:
    """A message with that ticket that came at the beginning of the epoch."""
    ticket = ticket or a_ticket()
    usual: dict[str, Any] = {"received": 0.0, "hardware_class": "cpu.batch"}
    return Delivery(ticket.job, ticket, body, "application/json", **(usual | fields))


def a_device(hardware_class: str = "cpu.batch", **fields: Any) -> DeviceFacts:
    """What the first device of a class reports."""
    usual: dict[str, Any] = {
        "worker": f"{hardware_class}@host",
        "device": "cpu:0",
        "kind": "cpu",
        "emulated": False,
        "name": "test",
        "memory_total": 2**34,
        "memory_free": 2**34,
    }
    return DeviceFacts(hardware_class=hardware_class, **(usual | fields))


def a_class(dollars: float = 1.0, **fields: Any) -> HardwareClass:
    """Some processors at that price an hour."""
    usual: dict[str, Any] = {
        "device": "cpu",
        "runtimes": ("echo",),
        "max_batch": 4,
        "max_wait": 0.0,
        "price": Price(dollars),
    }
    return HardwareClass(**(usual | fields))


def a_topology(**classes: HardwareClass) -> Topology:
    return Topology(hardware=classes, service={"standard": Service()}, default_service="standard")


def a_text_model(name: str = "sentiment", **variants: Variant) -> Model:
    """The first version of a model from text to text; the first variant is its reference."""
    return Model(
        name=name,
        version=1,
        summary="",
        licence="",
        pipeline="text",
        inputs=(TEXT,),
        outputs=(TEXT,),
        variants=variants,
        reference=next(iter(variants)),
    )


_ENGINE_MODEL = """
name: {name}
version: 1
aliases: [stable]
summary: What an engine answers.
licence: Apache-2.0
pipeline: {pipeline}
"""

_GENERATED = """
  - {name: text, datatype: BYTES, shape: [-1]}
  - {name: tokens, datatype: INT64, shape: [-1]}
  - {name: finish-reason, datatype: BYTES, shape: [-1]}
  - {name: usage, datatype: BYTES, shape: [-1]}
parameters:
  max_tokens: {type: integer, default: 64, minimum: 1, maximum: 512}
  temperature: {type: number, default: 0, minimum: 0, maximum: 2}
  stop: {type: strings, maximum: 4}
size_unit: tokens
expected_size: 96
buckets: [2048]
reference: engine
variants:
  engine: {runtime: openai, profiles: {endpoint: {base: 0.1, slope: 0, step: 0.001}}}
"""

ENGINE_MODELS = {
    "talk": _ENGINE_MODEL.format(name="talk", pipeline="chat")
    + """inputs: [{name: request, datatype: BYTES, shape: [-1]}]
outputs:
  - {name: message, datatype: BYTES, shape: [-1]}"""
    + _GENERATED,
    "tale": _ENGINE_MODEL.format(name="tale", pipeline="generation")
    + """inputs: [{name: prompt, datatype: BYTES, shape: [-1]}]
outputs:
  - {name: logprobs, datatype: BYTES, shape: [-1], optional: true}"""
    + _GENERATED.replace("parameters:", "parameters:\n  logprobs: {type: integer, minimum: 0, maximum: 5}"),
    "vector": _ENGINE_MODEL.format(name="vector", pipeline="text")
    + """inputs: [{name: text, datatype: BYTES, shape: [-1]}]
outputs: [{name: embedding, datatype: FP32, shape: [-1, 2]}]
reference: engine
variants:
  engine: {runtime: openai, profiles: {endpoint: {base: 0.1, slope: 0}}}
""",
    "rank": _ENGINE_MODEL.format(name="rank", pipeline="text")
    + """inputs:
  - {name: query, datatype: BYTES, shape: [-1]}
  - {name: document, datatype: BYTES, shape: [-1]}
outputs: [{name: score, datatype: FP32, shape: [-1]}]
reference: engine
variants:
  engine: {runtime: openai, entry: rerank, profiles: {endpoint: {base: 0.1, slope: 0}}}
""",
}
"""The model.yaml of models that `tests.engine` serves."""


def add_engine_models(models: Path, *names: str) -> None:
    """Write some of `ENGINE_MODELS` into a folder."""
    for name in names:
        (models / name).mkdir()
        (models / name / "model.yaml").write_text(ENGINE_MODELS[name])
