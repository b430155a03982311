"""An endpoint is measured through the protocol that its worker speaks."""

from pathlib import Path

import msgspec
import pytest

from tasks.models.model import parse_model
from tasks.models.profiles import Processor, load_profile
from tasks.queues.endpoints import Endpoint
from tests.builders import ENGINE_MODELS
from tests.engine import Engine, serving
from workers.device import endpoint_device
from workers.profiling.endpoint import measure_endpoint
from workers.profiling.report import write


def test_an_endpoint_is_measured_by_prompt_answer_and_load(tmp_path: Path) -> None:
    model = parse_model(ENGINE_MODELS["talk"], "talk/model.yaml")
    with serving(Engine(script="wait=0.1 one two three four")) as engine:
        endpoint = Endpoint(protocol="openai", url=engine.url, slots=4, models={"talk": "served"})
        device = endpoint_device(endpoint, "endpoint:0")
        (outcome,) = measure_endpoint(endpoint, device, "", [model], [], rounds=1)
        assert engine.most == 4
    assert outcome.error == outcome.skipped == ""
    measured = outcome.measurement
    assert measured is not None
    assert measured.step + measured.slope == pytest.approx(0.1, rel=0.5)
    (path,) = write([outcome], Processor(kind="endpoint", name=device.name), tmp_path)
    kept = load_profile(path).variants["engine"].profile
    assert kept == msgspec.structs.replace(kept, prompt_step=measured.prompt_step, prompt_slope=measured.prompt_slope)


def test_an_endpoint_that_cannot_be_reached_is_an_error() -> None:
    model = parse_model(ENGINE_MODELS["talk"], "talk/model.yaml")
    endpoint = Endpoint(protocol="openai", url="http://127.0.0.1:1/v1", slots=4, models={"talk": "served"})
    (outcome,) = measure_endpoint(endpoint, endpoint_device(endpoint, "endpoint:0"), "", [model], [], rounds=1)
    assert "cannot connect to 127.0.0.1:1" in outcome.error
