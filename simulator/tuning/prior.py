"""What a fleet expects before enough has arrived: a history or a mix that its operator names, else all models alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from simulator.own_fleet.history import day_of
from simulator.own_fleet.known import arrivals_from, under
from simulator.traces import TraceError, arrivals_of, synthetic_trace
from simulator.tuning.real_fleet import KnownFleet
from simulator.tuning.tuner import SHORTEST_PLAY
from tasks.history import Arrivals, joined
from tasks.models.profiles import generates
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
    span = f"duration={max(SHORTEST_PLAY, FEWEST_DRAWN / min(mix.values()))}"
    parts = [
        arrivals_of(synthetic_trace(f"{_sizes(model, known)},rate={rate},{span},seed={seed}", model=model), service)
        for seed, ((model, service), rate) in enumerate(mix.items())
    ]
    return under(joined(parts), known.topology, known.topology)


def _sizes(model: str, known: KnownFleet) -> str:
    """The sizes of a model's requests in a synthetic trace: only generating models have prompts and answers."""
    try:
        generating = generates(known.catalogue.resolve(model))
    except TaxiwayError as error:
        raise TraceError("--prior", 0, "models of the catalogue", repr(model)) from error
    return "poisson:" + ("size=1000,output=150" if generating else "size=1,output=0")
