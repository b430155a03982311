"""A model whose answers llama.cpp computes on the machine's own cores, beside the emulated ones of `lab.trial_fleet`.

How fast these cores are is not known before, unlike an emulated device's pace: it is measured before the trial, for the
model's profile and for the simulator.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import msgspec

from lab.trial_fleet.emulated_models import Asked
from simulator.fleet import DeviceClass, Fleet
from simulator.tuning.real_fleet import generation_timing
from tasks.document import Size
from tasks.models.model import Profile
from tasks.settings import TREE
from tasks.topology import HardwareClass
from tests.llama import NAME, llama_server

CLASS, STORY = "cpu.llama", "story"

SLOTS = 4
"""Generations at once on one engine."""

STORIES = Asked(before=1.6, after=0.8, live=4.0, standard=30.0, size=43, output=32)
"""An engine with one thread answers about two a second."""

QUEUES = f"""
  {CLASS}:
    device: endpoint
    endpoint:
      protocol: openai
      url: ["http://127.0.0.1:0/v1", "http://127.0.0.2:0/v1"]
      slots: {SLOTS}
      models: {{{STORY}: {NAME}}}
      start: {{llama: {{model: {STORY}, artefact: weights}}}}
    horizon: 3600
    price: {{usd_per_hour: 0.40}}
    labels: [{CLASS}]
    scaling: {{maximum: 2, start: 6}}
"""
"""The class in queues.yaml."""

_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Pace:
    """What llama.cpp takes here: seconds to read a request, and seconds of a step and of each row in it."""

    read: float
    step: float
    row: float

    def profile(self) -> Profile:
        """The same as in a model's file. An engine has its model before it serves."""
        return Profile(
            base=0.0, step=self.step, slope=self.row, load=0.0, prompt_step=0.0, prompt_slope=self.read / STORIES.size
        )


def request(number: int) -> dict[str, Any]:
    """A request. No two begin alike, or an engine would have read half of it before."""
    text = f"{number}: tell a long story of a river that wants to see the sea."
    return {"messages": [{"role": "user", "content": text}], "max_tokens": STORIES.output}


def write_model(folder: Path, pace: Pace) -> None:
    """Write the model's file into a folder of models: that of `chat` with another name and this profile."""
    document = msgspec.yaml.decode((TREE / "models" / "chat" / "model.yaml").read_text())
    document["name"] = STORY
    document["variants"]["engine"]["profiles"] = {"endpoint": msgspec.to_builtins(pace.profile())}
    (folder / STORY).mkdir(parents=True)
    (folder / STORY / "model.yaml").write_text(json.dumps(document))


def with_engines(fleet: Fleet, hardware: HardwareClass, pace: Pace) -> Fleet:
    """The simulator's fleet with engines, which have the model, and nothing else."""
    assert hardware.scaling.maximum is not None
    engines = DeviceClass(
        count=hardware.scaling.maximum,
        start=hardware.scaling.start,
        price=hardware.price,
        memory=Size(0),
        endpoint=True,
        max_batch=SLOTS,
        horizon=hardware.horizon,
    )
    timings = {name: (*row, None) for name, row in fleet.timings.items()}
    timing = generation_timing(pace.profile(), STORIES.size + STORIES.output / 2, load=0.0, memory=0)
    timings[STORY] = (*(None for _ in fleet.classes), timing)
    return replace(fleet, classes={**fleet.classes, CLASS: engines}, timings=timings)


def measured() -> Pace:
    """What llama.cpp takes on this machine, by one request at a time and as many as there are slots."""
    with llama_server(SLOTS) as url:
        return asyncio.run(_measured(f"{url}/v1/chat/completions"))


async def _measured(url: str) -> Pace:
    numbers, tokens = count(), STORIES.output - 1
    # llama.cpp closes kept connections, which a client without retries takes for a fault
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:

        async def seconds(rows: int, most: int) -> float:
            taken = []
            for _ in range(_REPEATS):
                began = time.perf_counter()
                await asyncio.gather(*(_asked(session, url, next(numbers), most) for _ in range(rows)))
                taken.append(time.perf_counter() - began)
            return median(taken)

        read = await seconds(1, 1)
        alone = (await seconds(1, STORIES.output) - read) / tokens
        together = (await seconds(SLOTS, STORIES.output) - SLOTS * read) / tokens
    row = max(together - alone, 0.0) / (SLOTS - 1)
    return Pace(read, max(alone - row, 0.0), row)


async def _asked(session: aiohttp.ClientSession, url: str, number: int, most: int) -> None:
    async with session.post(url, json={"model": NAME, **request(number), "max_tokens": most}) as answer:
        answer.raise_for_status()
        usage = (await answer.json())["usage"]
    if usage["completion_tokens"] != most:
        raise RuntimeError(f"expected {most} tokens of story {number}, got {usage['completion_tokens']}")
