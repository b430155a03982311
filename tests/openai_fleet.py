"""A fleet for OpenAI's clients: a real router and a worker that drives a scripted engine, on a real Valkey.

Its models are `talk` (chats), `tale` (completions) and `vector` (embeddings of two numbers); `SECOND` is also `talk`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from local.embedded import EmbeddedValkey
from tasks.models.catalogue import folder_of
from tasks.settings import Settings, settings_from
from tests.builders import add_engine_models, recorded
from tests.engine import Engine, serving
from tests.routing import HTTP, RouterProcess, eventually, router_process
from tests.working import worker_process, worker_settings

QUEUES = recorded("fleets/openai.yaml")

Caller = Callable[..., Any]
"""Calls a method of OpenAI's SDK."""

SECOND = "meta-llama/Llama-3.1-8B"
"""A name as other servers have it."""


@dataclass(frozen=True)
class OpenAIFleet:
    """A router's address, and the engine behind it."""

    router: RouterProcess
    engine: Engine
    settings: Settings

    @property
    def url(self) -> str:
        return f"{self.router.http}/v1"


def sdk(url: str) -> openai.OpenAI:
    """OpenAI's own client, which makes each call once."""
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30)


@contextmanager
def openai_fleet(
    folder: Path, options: Sequence[str] = (), queues: str = QUEUES, key: str = "none"
) -> Iterator[OpenAIFleet]:
    """The fleet, once its models are ready. `options` and `key` are the router's and one of its keys."""
    engine = Engine()
    with EmbeddedValkey(folder / "valkey") as server, serving(engine):
        base = settings_from({"TAXIWAY_BROKER": server.url, "TAXIWAY_SECRET": secrets.token_hex(32)})
        settings = worker_settings(base, folder, queues.format(url=engine.url))
        add_engine_models(settings.models, "talk", "tale", "vector")
        second = settings.models / folder_of(SECOND)
        second.mkdir()
        (second / "model.yaml").write_text(f"name: {SECOND}\nalias: talk\n")
        with worker_process(settings), router_process(settings, options=options) as router:
            address, headers = f"{router.http}/v2/models/talk/ready", {"authorization": f"Bearer {key}"}
            eventually(lambda: HTTP.get(address, headers=headers).is_success, within=30)
            yield OpenAIFleet(router, engine, settings)
