"""A worker's generated answers teach the routers how long the next ones will be."""

import uuid
from pathlib import Path

import msgspec
import pytest
import redis

from router.decide.basis import read_basis
from tasks.models.profiles import read_lengths
from tasks.settings import Settings
from taxiway.contract.job import read_meta, read_result
from taxiway.contract.keys import ARRIVALS, LENGTHS, job_key, lengths_cell, result_key
from taxiway.contract.request import Request
from taxiway.contract.wire import infer_message
from tests.builders import add_engine_models
from tests.engine import Engine, serving
from tests.openai_fleet import QUEUES
from tests.routing import eventually
from tests.serving import served_fleet
from tests.stored import fields_of
from tests.working import worker_settings


def ask(state: redis.Redis, prompts: str | list[str], tenant: str) -> tuple[list[int], float]:
    """The tokens of each answer, and the size that the router expected of the request."""
    job = str(uuid.uuid4())
    request = Request(model="tale", inputs=prompts, parameters={"max_tokens": 256}, tenant=tenant)
    state.lpush(ARRIVALS, infer_message(job, msgspec.structs.replace(request, deadline=60), reply="", origin="test"))
    answer = read_result(read_meta(eventually(lambda: state.get(result_key(job)), within=60)))
    basis = read_basis(fields_of(state, job_key(job))["basis"])
    assert basis is not None
    return answer.outputs["tokens"], basis.needs.size


def test_the_answers_to_a_tenant_size_only_its_own_next_request(settings: Settings, tmp_path: Path) -> None:
    cell, prompt = lengths_cell("tale:1", "lab"), "the capital of France is Paris"  # which the engine says, too
    with serving(Engine()) as engine, redis.Redis.from_url(settings.broker) as state:
        fleet = worker_settings(settings, tmp_path, QUEUES.format(url=engine.url))
        add_engine_models(fleet.models, "talk", "tale", "vector")
        with served_fleet(fleet, "tale"):
            _learn(state, cell, prompt)


def _learn(state: redis.Redis, cell: str, prompt: str) -> None:
    short, first = ask(state, [prompt] * 12, "lab")
    learned = read_lengths(eventually(lambda: state.hget(LENGTHS, cell)))
    assert sum(learned.values()) == pytest.approx(12)
    assert max(short) < 64

    eventually(lambda: ask(state, [prompt], "lab")[1] < first - 64, within=120)
    assert ask(state, [prompt] * 12, "other")[1] == first
