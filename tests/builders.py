"""Values of which a test names only the fields that it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.heartbeat import DeviceFacts
from tasks.models.model import Model, Variant
from tasks.models.tensor_spec import TensorSpec
from tasks.ticket import Ticket
from tasks.topology import HardwareClass, Price, Service, Topology
from taxiway.contract.job import Result, RunReport
from taxiway.contract.keys import INFER

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


def a_report(**fields: Any) -> RunReport:
    usual: dict[str, Any] = {
        "hardware_class": "cpu.batch",
        "variant": "onnx-int8",
        "device": "cpu:0",
        "emulated": False,
        "batch": 1,
        "queue_wait": 0.0,
        "run_time": 0.0,
        "cost": 0.0,
        "reason": "the test says so",
    }
    return RunReport(**(usual | fields))


def a_result(model: str = "echo:1", **outputs: Any) -> Result:
    return Result(model=model, outputs=outputs, report=a_report())


def a_chat(text: str, **fields: Any) -> dict[str, Any]:
    """A chat that begins with what its user says."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def nested(levels: int, innermost: Any = 1) -> Any:
    """A list in a list, so many of them."""
    for _ in range(levels):
        innermost = [innermost]
    return innermost


RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    """The text of a file of tests/recorded."""
    return (RECORDED / name).read_text(encoding="utf-8")


ENGINE_MODELS = {name: recorded(f"engine_models/{name}.yaml") for name in ("talk", "tale", "vector", "rank")}
"""The model.yaml of models that `tests.engine` serves."""


def add_engine_models(models: Path, *names: str) -> None:
    """Write some of `ENGINE_MODELS` into a folder."""
    for name in names:
        (models / name).mkdir()
        (models / name / "model.yaml").write_text(ENGINE_MODELS[name])
