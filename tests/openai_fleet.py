"""A fleet for OpenAI's clients: a real router and a worker that drives a scripted engine, on a real Valkey.

Its models are `talk` (chats), `tale` (completions) and `vector` (embeddings of two numbers).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from local.embedded import EmbeddedValkey
from tasks.settings import Settings, settings_from
from tests.engine import Engine, serving
from tests.routing import RouterProcess, eventually, router_process
from tests.working import worker_process, worker_settings

QUEUES = """
hardware:
  cpu.batch:
    device: endpoint
    endpoint:
      protocol: openai
      url: {url}
      slots: 4
      models: {{talk: served, tale: served, vector: served}}
      health: {{every: 0.2}}
    price: {{usd_per_hour: 1}}
    labels: [lab]
service:
  standard: {{deadline: 60}}
  patient: {{deadline: 600, priority: low, tier: flex}}
default_service: standard
limits: {{lease: 1, stall: 2, grace: 6, payload: 64KiB, wait: 1}}
"""

_MODEL = """
name: {name}
version: 1
aliases: [stable]
summary: What an engine answers.
licence: Apache-2.0
pipeline: {pipeline}
"""

_ANSWER = """
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

MODELS = {
    "talk": _MODEL.format(name="talk", pipeline="chat")
    + """inputs: [{name: request, datatype: BYTES, shape: [-1]}]
outputs:
  - {name: message, datatype: BYTES, shape: [-1]}"""
    + _ANSWER,
    "tale": _MODEL.format(name="tale", pipeline="generation")
    + """inputs: [{name: prompt, datatype: BYTES, shape: [-1]}]
outputs:"""
    + _ANSWER,
    "vector": _MODEL.format(name="vector", pipeline="text")
    + """inputs: [{name: text, datatype: BYTES, shape: [-1]}]
outputs: [{name: embedding, datatype: FP32, shape: [-1, 2]}]
reference: engine
variants:
  engine: {runtime: openai, profiles: {endpoint: {base: 0.1, slope: 0}}}
""",
}


@dataclass(frozen=True)
class OpenAIFleet:
    """A router's address, and the engine behind it."""

    router: RouterProcess
    engine: Engine
    settings: Settings

    @property
    def url(self) -> str:
        return f"{self.router.http}/v1"


def add_models(models: Path) -> None:
    """Write the models into a folder."""
    for name, text in MODELS.items():
        (models / name).mkdir()
        (models / name / "model.yaml").write_text(text)


@contextmanager
def openai_fleet(
    folder: Path, options: Sequence[str] = (), queues: str = QUEUES, key: str = "none"
) -> Iterator[OpenAIFleet]:
    """The fleet, once its models are ready. `options` and `key` are the router's and one of its keys."""
    engine = Engine()
    with EmbeddedValkey(folder / "valkey") as server, serving(engine):
        base = settings_from({"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": secrets.token_hex(32)})
        settings = worker_settings(base, folder, queues.format(url=engine.url))
        add_models(settings.models)
        with worker_process(settings), router_process(settings, options=options) as router:
            address, headers = f"{router.http}/v2/models/talk/ready", {"authorization": f"Bearer {key}"}
            eventually(lambda: httpx.get(address, headers=headers, trust_env=False).is_success, within=30)
            yield OpenAIFleet(router, engine, settings)
