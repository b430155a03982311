"""What a tuner expects that has seen no arrivals: what operators say, or all models and services alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from router.decide.plan import Plan
from simulator.fleet import SERVICES, USABLE, Fleet, Stepping
from simulator.own_fleet.history import day_of
from simulator.own_fleet.known import arrivals_from, under
from simulator.traces import TraceError, synthetic_arrivals, trace_of
from simulator.tuning.real_fleet import KnownFleet
from simulator.tuning.tuner import SHORTEST_PLAY
from simulator.workload import Workload, prepare
from tasks.history import Arrivals, indices, joined
from tasks.models.model import generates
from taxiway.errors import TaxiwayError

Mix = Mapping[tuple[str, str], float]
"""Requests a second by model and service; the default service has no name."""

Prior = Mix | Arrivals

ALIKE = 1 / 15
"""Requests a second of each model and service where nothing is known."""

FEWEST_DRAWN = 15
"""Requests of the rarest kind that are drawn, so that there is one of each."""


def parse_prior(text: str, url: str) -> Prior:
    """A UTC day of the history in the state store at `url`, a CSV file, or a mix such as `chat/live=0.5,embed=3`.

    Raises:
        CommandError: the day has no arrivals.
        TraceError: it is none of these.
    """
    if day_of(text) or Path(text).exists():
        return arrivals_from(text, "", url, None)
    mix = {}
    for part in text.split(","):
        name, _, rate = part.rpartition("=")
        model, _, service = name.partition("/")
        try:
            mix[model, service] = float(rate)
        except ValueError:
            mix[model, service] = 0.0
        if not model or not 0 < mix[model, service] < 1e4:
            raise TraceError("--prior", 0, "a CSV file, a day, or MODEL[/SERVICE]=RATE,…", repr(part))
    return mix


def expected(prior: Prior, known: KnownFleet) -> Arrivals:
    """Arrivals as the prior says, with the services' deadlines; of an empty mix, of all models and services alike."""
    if isinstance(prior, Arrivals):
        return under(prior, known.topology, known.topology)
    services = known.topology.service
    mix = prior or {(model, service): ALIKE for model in known.catalogue.models for service in services}
    span = max(SHORTEST_PLAY, FEWEST_DRAWN / min(mix.values()))
    parts = [
        _drawn(model, service, rate, seed, generating=_generates(model, known), span=span)
        for seed, ((model, service), rate) in enumerate(mix.items())
    ]
    return under(joined(parts), known.topology, known.topology)


def displaces(fleet: Fleet) -> bool:
    """Whether a device cannot hold all models that it may run: what comes first decides what is loaded, for all.

    Elsewhere requests are placed better one by one than by a guess.
    """
    by_class = zip(*fleet.timings.values(), strict=True)
    return any(
        sum(timing.memory for timing in timings if timing is not None) > device.memory * USABLE
        for device, timings in zip(fleet.classes.values(), by_class, strict=True)
    )


def guess(plan: Plan) -> Plan:
    """The plan for what is not known: it says nothing of devices."""
    return msgspec.structs.replace(plan, classes={}, guessed=True)


def all_alike(workload: Workload) -> Workload:
    """As many requests of all models and services as a tuner expects that has seen none, with the workload's terms."""
    trace, parts = workload.trace, list[Arrivals]()
    for model, service in sorted({*zip(trace.model.tolist(), trace.service.tolist(), strict=True)}):
        like = trace.part(np.flatnonzero((trace.model == model) & (trace.service == service)))
        name = trace.models[model]
        generating = any(isinstance(timing, Stepping) for timing in workload.fleet.timings[name])
        drawn = _drawn(name, SERVICES[service], ALIKE, len(parts), generating=generating)
        drawn.jobs["deadline"], drawn.jobs["priority"] = np.median(like.deadline), like.priority[0]
        parts.append(drawn)
    asked = trace_of(joined(parts))
    numbers = np.array(indices(asked.models, trace.models), np.int16)
    return prepare(replace(asked, models=trace.models, model=numbers[asked.model]), workload.fleet)


def _drawn(
    model: str, service: str, rate: float, seed: int, *, generating: bool, span: float = SHORTEST_PLAY
) -> Arrivals:
    """Arrivals of a model at a rate: only generating models have prompts and answers."""
    sizes = "size=1000,output=150" if generating else "size=1,output=0"
    spec = f"poisson:{sizes},rate={rate},duration={span},seed={seed}"
    return synthetic_arrivals(spec, model=model, service=service)


def _generates(model: str, known: KnownFleet) -> bool:
    try:
        return generates(known.catalogue.resolve(model))
    except TaxiwayError as error:
        raise TraceError("--prior", 0, "models of the catalogue", repr(model)) from error
