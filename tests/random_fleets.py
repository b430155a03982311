"""Fleets that nobody tuned on, and what arrives at them: the search must find at least what its opponents find."""

import json
from collections.abc import Iterable

import numpy as np

from lab.fleet_file import parse_fleet, prepare
from lab.rows import make_trace
from simulator.fleet import SERVICES, Fleet
from simulator.policies.policy import Assignment
from simulator.tuning.opponents import pin, split
from simulator.tuning.search import Search, fresh
from simulator.tuning.twin import Twin, Window, usual

Random = np.random.Generator

SPAN, PLAYS = 120.0, 80
"""Seconds of arrivals, and the plays of each search."""

SHARES = (0.4, 0.4, 0.2)


def window(seed: int) -> Window:
    """Two to twenty models of unlike popularity on two to eight classes, where faster devices cost more."""
    random = np.random.default_rng(seed)
    models, places = int(random.integers(2, 21)), int(random.integers(2, 9))
    seconds = np.exp(random.uniform(np.log(0.01), np.log(0.3), models))
    popular = 1 / np.arange(1, models + 1) ** random.uniform(0, 1.2)
    counts = random.poisson(random.uniform(1, 3) * SPAN * popular / popular.sum())
    rows = [
        {
            "arrival": float(at),
            "model": f"m{model}",
            "size": 1,
            "service": (service := int(random.choice(3, p=SHARES))),
            "deadline": (max(10 * float(seconds[model]), 0.3), 20.0, 900.0)[service],
        }
        for model, count in enumerate(counts)
        for at in random.uniform(0, SPAN, max(count, 1))
    ]
    return Window.all(prepare(make_trace(rows), fleet(random, seconds, places), seed=1), SPAN)


def fleet(random: Random, seconds: np.ndarray, places: int) -> Fleet:
    """Classes whose devices take about these seconds for the models, divided by how fast they are."""
    speed = np.exp(random.normal(0, 1, places))
    memory = random.uniform(0.5, 6, len(seconds))
    classes = {}
    for place in range(places):
        price, spot = float(speed[place] * np.exp(random.normal(0, 0.4))), bool(place and random.random() < 0.2)
        able = [model for model in range(len(seconds)) if place == 0 or random.random() < 0.85]
        alone = {model: float(seconds[model] / speed[place] * np.exp(random.normal(0, 0.5))) for model in able}
        classes[f"c{place}"] = {
            "count": int(random.integers(2, 9)),
            "initial": int(random.integers(0, 2)),
            "price": {"usd_per_hour": price, "spot_usd_per_hour": price / 2},
            "spot": spot,
            "memory": f"{random.choice([8, 16, 32])}GiB",
            "start": float(random.choice([5, 30, 90])),
            "max_batch": int(random.choice([4, 8, 32])),
            "curves": {
                f"m{model}": {"base": base, "slope": 0.3 * base, "load": 2, "memory": f"{memory[model]:.2f}GiB"}
                for model, base in alone.items()
            },
        }
    services = {
        name: {"share": share, "preemptible": name == "bulk"} for name, share in zip(SERVICES, SHARES, strict=True)
    }
    penalties = {"live": 16, "standard": 8, "bulk": 4}
    text = {"default_model": "m0", "classes": classes, "services": services, "penalties": penalties}
    return parse_fleet(json.dumps(text))


def lead(seed: int) -> float:
    """The score of what the search finds over the better opponent's, in the same twin with as many plays."""
    known = window(seed)
    conditions = usual(known.workload.fleet, fresh(known.workload.fleet))

    def search() -> Search:
        return Search(Twin(known, conditions), seed=1)

    def played(assignment: Assignment) -> float:
        return Twin(known, conditions).play(assignment).score

    found = search().find(None, PLAYS).score
    return found / min(tune(search(), played, PLAYS).score for tune in (pin, split))


def leads(seeds: Iterable[int]) -> np.ndarray:
    """Every fleet's lead; shape (n,)."""
    return np.array([lead(seed) for seed in seeds])
