"""Seeded synthetic traces, from a text such as `poisson:rate=50,duration=600,seed=1`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from simulator.traces.trace import UNSET, Trace, TraceError, predict

Random = np.random.Generator
Times = NDArray[np.float64]

_COMMON: Mapping[str, float] = {"duration": 600.0, "seed": 0.0, "size": 1000.0, "output": 150.0, "spread": 1.0}

_MOST = 20_000_000


def is_spec(text: str) -> bool:
    """Whether the text specifies a synthetic trace."""
    return text.partition(":")[0] in KINDS


def synthetic_trace(spec: str, *, model: str) -> Trace:
    """The trace that `spec` describes: a kind, then its figures.

    Every kind has `duration` (seconds), `seed`, and the mean `size` and `output` of requests, which are log-normal with
    the standard deviation `spread` of their logarithm; 0 makes them all equal.

    Raises:
        TraceError: unknown kind or figure, or a figure out of range.
    """
    kind, _, text = spec.partition(":")
    if kind not in KINDS:
        raise TraceError(spec, 0, f"a kind of trace, one of {', '.join(sorted(KINDS))}", repr(kind))
    make, own = KINDS[kind]
    figures = _figures(spec, text, {**_COMMON, **own})
    random = np.random.default_rng(int(figures["seed"]))
    arrival = make(figures, random)
    if len(arrival) == 0:
        raise TraceError(spec, 0, "a rate and a duration that give at least one request", "none")
    return _trace(arrival, figures, random, model)


def _figures(spec: str, text: str, defaults: Mapping[str, float]) -> dict[str, float]:
    figures = dict(defaults)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in defaults:
            raise TraceError(spec, 0, f"one of {', '.join(sorted(defaults))}", repr(name))
        try:
            figures[name] = float(value)
        except ValueError:
            raise TraceError(spec, 0, f"{name} as a number", repr(value)) from None
        if not 0 <= figures[name] < 1e9:
            raise TraceError(spec, 0, f"{name} from 0 to 1e9", repr(value))
    rate = max((figures[name] for name in ("rate", "high", "low", "peak") if name in figures), default=0.0)
    if rate * figures["duration"] > _MOST:
        raise TraceError(spec, 0, f"at most {_MOST} requests", f"{rate * figures['duration']:.0f}")
    return figures


def _trace(arrival: Times, figures: Mapping[str, float], random: Random, model: str) -> Trace:
    count = len(arrival)
    size = _sizes(figures["size"], figures["spread"], count, random)
    output = _sizes(figures["output"], figures["spread"], count, random)
    return Trace(
        models=(model,),
        tenants=("",),
        arrival=arrival - arrival[0],
        model=np.zeros(count, np.int16),
        size=size,
        output=output,
        predicted=predict(output, np.zeros(count, np.int64)),
        deadline=np.full(count, np.nan),
        priority=np.full(count, UNSET, np.int8),
        service=np.full(count, UNSET, np.int8),
        tenant=np.zeros(count, np.int32),
    )


def _sizes(mean: float, spread: float, count: int, random: Random) -> NDArray[np.int32]:
    """Integers from 1 with the given mean, log-normal; all 0 if the mean is 0."""
    drawn = mean * np.exp(spread * random.standard_normal(count) - spread**2 / 2)
    return np.rint(np.maximum(drawn, min(mean, 1.0))).astype(np.int32)


def _poisson(figures: Mapping[str, float], random: Random) -> Times:
    """Arrivals at a constant rate."""
    return _uniform(figures["rate"], 0.0, figures["duration"], random)


def _mmpp(figures: Mapping[str, float], random: Random) -> Times:
    """A Markov-modulated Poisson process of two rates, each kept for `stay` seconds on average (Fischer, 1993)."""
    now, fast, parts = 0.0, False, [np.empty(0)]
    while now < figures["duration"]:
        until = min(now + random.exponential(max(figures["stay"], 1e-3)), figures["duration"])
        parts.append(_uniform(figures["high" if fast else "low"], now, until, random))
        now, fast = until, not fast
    return np.concatenate(parts)


def _diurnal(figures: Mapping[str, float], random: Random) -> Times:
    """A rate with a daily pattern: `rate · (1 − swing · cos(2πt / period))`."""
    swing = min(figures["swing"], 1.0)
    times = _uniform(figures["rate"] * (1 + swing), 0.0, figures["duration"], random)
    share = (1 - swing * np.cos(2 * np.pi * times / max(figures["period"], 1e-3))) / (1 + swing)
    return times[random.random(len(times)) < share]


def _flash(figures: Mapping[str, float], random: Random) -> Times:
    """A constant rate, plus a crowd at the rate `peak` from second `at` for `length` seconds."""
    begin = min(figures["at"], figures["duration"])
    end = min(begin + figures["length"], figures["duration"])
    crowd = _uniform(figures["peak"], begin, end, random)
    return np.sort(np.concatenate([_uniform(figures["rate"], 0.0, figures["duration"], random), crowd]))


def _uniform(rate: float, begin: float, end: float, random: Random) -> Times:
    """Poisson arrivals between two times: their number first, then their uniform positions."""
    return np.sort(random.uniform(begin, end, random.poisson(rate * (end - begin))))


KINDS: Mapping[str, tuple[Callable[[Mapping[str, float], Random], Times], Mapping[str, float]]] = {
    "poisson": (_poisson, {"rate": 10.0}),
    "mmpp": (_mmpp, {"low": 5.0, "high": 50.0, "stay": 30.0}),
    "diurnal": (_diurnal, {"rate": 10.0, "swing": 0.8, "period": 3600.0}),
    "flash": (_flash, {"rate": 10.0, "peak": 100.0, "at": 120.0, "length": 60.0}),
}
"""Each kind's generator, and its own figures with their defaults."""
