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
    """What each model takes on a class: bytes of its memory, and seconds to load."""

    memory: Mapping[str, int]
    load: Mapping[str, float]


LIGHT = Weights({CHEAP: MIB, DEAR: 65 * MIB}, {CHEAP: 0.0, DEAR: 0.0})
"""A device of either class holds three or all of the four models, and loads one in no time."""

COLD = Weights({CHEAP: 24 * MIB, DEAR: 80 * MIB}, {CHEAP: 1.5, DEAR: 3.0})
"""A device of the cheap class holds two of the four models, one of the dear class three."""

SHARES = (0.4, 0.4, 0.2)
"""Of each model's requests, by service. Source: shared/trials."""

PENALTIES = (48.0, 24.0, 12.0)
"""US dollars an hour when all of a service is missed. Source: shared/trials."""

BULK_DUE = 300.0


@dataclass(frozen=True, slots=True)
class Emulated:
    """A model: seconds a batch and a row on each class, requests per second before and after the drift, deadlines."""

    paces: Mapping[str, tuple[float, float]]
    before: float
    after: float
    live: float
    standard: float


MODELS: Mapping[str, Emulated] = {
    "sentiment": Emulated({CHEAP: (0.04, 0.001), DEAR: (0.012, 0.0001)}, 8.0, 8.0, live=0.75, standard=5),
    "embed": Emulated({CHEAP: (0.1, 0.005), DEAR: (0.02, 0.0002)}, 5.0, 5.0, live=0.75, standard=5),
    "image": Emulated({CHEAP: (0.1, 0.5), DEAR: (0.02, 0.12)}, 3.0, 6.0, live=2.0, standard=20),
    "chat": Emulated({CHEAP: (2.0, 0.3), DEAR: (0.4, 0.04)}, 5.0, 2.5, live=3.0, standard=30),
}


EARLIER = 100
"""The seed of the requests before the trial is the trial's and this."""


def requests(seconds: float, seed: int, *, warm: float = 0.0) -> Trace:
    """All requests: each model's arrive at random at its rate, which changes at half time.

    Requests of the `warm` seconds before arrive at the first rate; the trial's begin at `warm`.
    """
    first = {name: model.before for name, model in MODELS.items()}
    second = {name: model.after for name, model in MODELS.items()}
    rows = list(_rows(first, 0.0, warm, np.random.default_rng(seed + EARLIER)))
    random = np.random.default_rng(seed)
    rows += [*_rows(first, warm, seconds / 2, random), *_rows(second, warm + seconds / 2, seconds / 2, random)]
    return make_trace(rows)


def _rows(
    rates: Mapping[str, float], begin: float, seconds: float, random: np.random.Generator
) -> Iterator[dict[str, Any]]:
    for name, rate in rates.items():
        times = begin + random.uniform(0, seconds, int(rate * seconds))
        services = random.choice(len(SERVICES), len(times), p=SHARES)
        for at, service in zip(times.tolist(), services.tolist(), strict=True):
            due = (MODELS[name].live, MODELS[name].standard, BULK_DUE)[service]
            yield {"arrival": at, "model": name, "size": 1, "deadline": due, "service": service}


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
        load = weights.load[name]
        profile = {"base": base, "slope": row, "load": load}
        variants[name.partition(".")[0]] = {
            "runtime": "echo",
            "entry": f"paced={base}+{row},load={load}",
            "memory": weights.memory[name],
            "max_batch": 32,
            "profiles": dict.fromkeys(("cpu", "cuda"), profile),
        }
    return f"reference: cpu\nvariants: {json.dumps(variants)}\nexamples: [x]\n"


def simulated(topology: Topology, weights: Weights = LIGHT) -> Fleet:
    """The fleet as the simulator's, on which an operator tunes a static split."""
    classes = {}
    for name, hardware in topology.hardware.items():
        classes[name] = {
            "count": hardware.scaling.maximum,
            "price": msgspec.to_builtins(hardware.price),
            "memory": hardware.memory,
            "start": hardware.scaling.start,
            "max_batch": hardware.max_batch,
            "max_wait": hardware.max_wait,
            "max_run": hardware.max_run,
            "horizon": hardware.horizon,
            "curves": {model: _curve(one.paces[name], name, weights) for model, one in MODELS.items()},
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


def _curve(pace: tuple[float, float], name: str, weights: Weights) -> dict[str, float]:
    base, row = pace
    return {"base": base, "slope": row, "load": weights.load[name], "memory": weights.memory[name]}
