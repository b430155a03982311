"""What arrives at three sites in a day, compressed: the busy hours of each begin when those of another end."""

from __future__ import annotations

import numpy as np

from lab.rows import make_trace, synthetic_trace
from lab.sites.site import CATALOGUE, PRIVATE, SITES
from lab.trials.trial import IMAGE_ROWS, SHARES, TERMS
from simulator.fleet import SERVICES
from simulator.traces import Trace

DAY = 1440.0
"""Seconds that stand for 24 hours: a minute for an hour."""

SWING = 0.9
"""At noon this share more than on average arrives, and at midnight this share less."""

RATES = {"edge": {"sentiment": 2.0, "image": 1.0}, "lab": {"sentiment": 2.0, "image": 2.0}}
RATES["cloud"] = {"sentiment": 2.0, "image": 3.0}
"""Requests a second, on average."""

STAY = 0.25
"""Share of requests that may not leave their site."""


def day(seed: int, *, shift: float) -> Trace:
    """A day's requests; noon at each site is `shift` of a day later than at the one before."""
    random, rows = np.random.default_rng(seed), []
    for number, site in enumerate(SITES):
        for model in CATALOGUE:
            spec = f"diurnal:rate={RATES[site][model]},swing={SWING},period={DAY},duration={DAY}"
            times = synthetic_trace(f"{spec},seed={random.integers(10**6)}", model=model).arrival
            for arrival in (times + number * shift * DAY) % DAY:
                service = int(random.choice(len(SERVICES), p=SHARES))
                rows.append(
                    {
                        "arrival": float(arrival),
                        "model": model,
                        "size": int(random.integers(IMAGE_ROWS[0], IMAGE_ROWS[1] + 1)) if model == "image" else 1,
                        "deadline": float(TERMS[model].due[service]),
                        "service": service,
                        "tenant": site + PRIVATE * bool(random.random() < STAY),
                    }
                )
    return make_trace(rows)
