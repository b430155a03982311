"""The models, requests and fleet of `lab.trial_fleet`: what real processes run, and the simulator's form of it.

A model has a `paced` variant for each hardware class. The one for the dear class needs more memory than the cheap class
has. Images double at half time, and the language model halves. `COLD` models take seconds to load, and a device cannot
hold all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lab.fleet_file import parse_fleet
from lab.rows import make_trace
from simulator.fleet import SERVICES, Fleet
from simulator.traces import Trace
from tasks.settings import TREE
from tasks.topology import Topology

QUEUES = Path(__file__).with_name("queues.yaml")

CHEAP, DEAR = "cpu.batch", "gpu.realtime"

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Weights:
    """What each model takes on a class: bytes of its memory, and seconds to read its weights."""

    memory: Mapping[str, int]
    read: Mapping[str, float]


LIGHT = Weights({CHEAP: MIB, DEAR: 65 * MIB}, {CHEAP: 0.0, DEAR: 0.0})
"""A device of either class holds three or all of the four models, and reads one in no time."""

COLD = Weights({CHEAP: 24 * MIB, DEAR: 80 * MIB}, {CHEAP: 1.5, DEAR: 3.0})
"""A device of the cheap class holds two of the four models, one of the dear class three."""

SHARES = (0.4, 0.4, 0.2)
"""Of each model's requests, by service. Source: shared/trials."""

PENALTIES = (48.0, 24.0, 12.0)
"""US dollars an hour when all of a service is missed. Source: shared/trials."""

BULK_DUE = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of a model: requests per second before and after the drift, their deadlines and their sizes."""

    before: float
    after: float
    live: float
    standard: float
    size: int = 1
    output: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulated(Asked):
    """A model, and the seconds of a batch and of a row of it on each class."""

    paces: Mapping[str, tuple[float, float]]

    def profile(self, name: str, weights: Weights) -> dict[str, float]:
        """Its profile on a class. A worker that has read a model runs its example: that is part of a load."""
        base, row = self.paces[name]
        return {"base": base, "slope": row, "load": weights.read[name] + base + row}


MODELS: Mapping[str, Emulated] = {
    "sentiment": Emulated(
        paces={CHEAP: (0.04, 0.001), DEAR: (0.012, 0.0001)}, before=8.0, after=8.0, live=0.75, standard=5
    ),
    "embed": Emulated(paces={CHEAP: (0.1, 0.005), DEAR: (0.02, 0.0002)}, before=5.0, after=5.0, live=0.75, standard=5),
    "image": Emulated(paces={CHEAP: (0.1, 0.5), DEAR: (0.02, 0.12)}, before=3.0, after=6.0, live=2.0, standard=20),
    "chat": Emulated(paces={CHEAP: (2.0, 0.3), DEAR: (0.4, 0.04)}, before=5.0, after=2.5, live=3.0, standard=30),
}


EARLIER = 100
"""The seed of the requests before the trial is the trial's and this."""


def requests(seconds: float, seed: int, *, warm: float = 0.0, models: Mapping[str, Asked] = MODELS) -> Trace:
    """All requests: each model's arrive at random at its rate, which changes at half time.

    Requests of the `warm` seconds before arrive at the first rate; the trial's begin at `warm`.
    """
    first = {name: model.before for name, model in models.items()}
    second = {name: model.after for name, model in models.items()}
    half, random = seconds / 2, np.random.default_rng(seed)
    rows = list(_rows(models, first, 0.0, warm, np.random.default_rng(seed + EARLIER)))
    rows += [*_rows(models, first, warm, half, random), *_rows(models, second, warm + half, half, random)]
    return make_trace(rows)


def _rows(
    models: Mapping[str, Asked], rates: Mapping[str, float], begin: float, seconds: float, random: np.random.Generator
) -> Iterator[dict[str, Any]]:
    for name, model in models.items():
        times = begin + random.uniform(0, seconds, int(rates[name] * seconds))
        services = random.choice(len(SERVICES), len(times), p=SHARES)
        for at, service in zip(times.tolist(), services.tolist(), strict=True):
            due = (model.live, model.standard, BULK_DUE)[service]
            about = {"model": name, "size": model.size, "output": model.output}
            yield {"arrival": at, "deadline": due, "service": service, **about}


def write_models(folder: Path, weights: Weights = LIGHT) -> None:
    """Write the model files into a folder of models."""
    described = (TREE / "models" / "paced" / "model.yaml").read_text().partition("reference:")[0]
    for name, model in MODELS.items():
        (folder / name).mkdir(parents=True)
        text = described.replace("name: paced", f"name: {name}", 1) + _variants(model, weights)
        (folder / name / "model.yaml").write_text(text)


def _variants(model: Emulated, weights: Weights) -> str:
    variants = {}
    for name, (base, row) in model.paces.items():
        variants[name.partition(".")[0]] = {
            "runtime": "echo",
            "entry": f"paced={base}+{row},load={weights.read[name]}",
            "memory": weights.memory[name],
            "max_batch": 32,
            "profiles": dict.fromkeys(("cpu", "cuda"), model.profile(name, weights)),
        }
    return f"reference: cpu\nvariants: {json.dumps(variants)}\nexamples: [x]\n"


def simulated(topology: Topology, weights: Weights = LIGHT) -> Fleet:
    """The emulated devices as the simulator's fleet, on which an operator tunes a static split."""
    classes = {}
    for name in (CHEAP, DEAR):
        hardware = topology.hardware[name]
        classes[name] = {
            "count": hardware.scaling.maximum,
            "price": msgspec.to_builtins(hardware.price),
            "memory": hardware.memory,
            "start": hardware.scaling.start,
            "max_batch": hardware.max_batch,
            "max_wait": hardware.max_wait,
            "max_run": hardware.max_run,
            "horizon": hardware.horizon,
            "curves": {
                model: one.profile(name, weights) | {"memory": weights.memory[name]} for model, one in MODELS.items()
            },
        }
    services = {
        name: {
            "share": share,
            "deadline": topology.service[name].deadline,
            "priority": topology.service[name].priority,
            "preemptible": topology.service[name].preemptible,
        }
        for name, share in zip(SERVICES, SHARES, strict=True)
    }
    penalties = dict(zip(SERVICES, PENALTIES, strict=True))
    document = {"default_model": "chat", "classes": classes, "services": services, "penalties": penalties}
    return parse_fleet(json.dumps(document), str(QUEUES))
