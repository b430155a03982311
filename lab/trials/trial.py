"""Trials of placement by name: 900 s of several models that compete for unlike hardware, drawn with a seed.

Small models and images arrive as Poisson processes. Language models arrive as in the Azure LLM traces (Patel et al.,
Splitwise, ISCA 2024), drawn from their files where these are given, otherwise from a process of two rates with the same
means and about the same bursts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.changes import HardwareChange
from lab.fleet_file import FileFleet, load_fleet, prepare
from lab.rows import make_trace, read_trace, synthetic_trace
from simulator.fleet import SERVICES
from simulator.traces import Trace
from simulator.workload import Workload

LENGTH = 900.0
"""Seconds of a trial."""

SHARES = (0.4, 0.4, 0.2)
"""Of each model's requests, by service."""

IMAGE_ROWS = (30, 90)
"""Rows of an image request, uniform, both included."""

AZURE_BEGINS = 1500.0
"""Where the trials' part of the Azure traces begins, in seconds."""

AZURE_SHIFT = 10.0
"""Seconds by which a drawn request is moved at most, so that seeds differ."""

LONGEST = 8000
"""Tokens of a synthetic prompt at most. Azure's longest is 7,437."""

FLASH = (520.0, 640.0)
"""Seconds in which more than usual arrives at `flash`."""

Random = np.random.Generator
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Terms:
    """Deadlines in seconds by service; a live one is longer by `per_token` for each generated token."""

    due: tuple[float, float, float]
    per_token: float = 0.0


@dataclass(frozen=True, slots=True)
class Language:
    """How a language model's requests arrive: as in an Azure file, or as a synthetic trace."""

    file: str
    spec: str


SMALL, IMAGE = Terms((0.3, 5, 900)), Terms((2, 20, 900))

TERMS: Mapping[str, Terms] = {
    "sentiment": SMALL,
    "sentiment.p": SMALL,
    "embed": SMALL,
    "image": IMAGE,
    "image.p": IMAGE,
    "chat": Terms((3, 60, 900), per_token=0.03),
    "big": Terms((3, 60, 900), per_token=0.06),
}

CHAT = Language("azure_llm_conv.csv", "mmpp:low=6,high=8,stay=60,size=1200,output=155,spread=0.9")
CODE = Language("azure_llm_code.csv", "mmpp:low=0,high=6,stay=20,size=2000,output=28,spread=1.1")
"""Seconds 1,500 to 2,400 of Azure's traces have 7.0 requests a second of 1,200 tokens and 155 generated, 2.3 times as
variable as Poisson's in 10 s; and 3.0 of 2,000 and 28, in bursts and pauses of tens of seconds."""


def mixed(random: Random, data: Path | None, *, image: float = 2.5) -> list[Row]:
    """Five models; `image` is that model's requests per second."""
    rows = [*_small("sentiment", 3.0, random), *_small("embed", 2.0, random), *_images("image", image, random)]
    rows += _language("chat", CHAT, 1.0, random, data)
    rows += _language("big", CODE, 0.8, random, data)
    return rows


def drift(random: Random, data: Path | None) -> list[Row]:
    """`mixed` with fewer images; from half time, within 90 s, images double and language models halve."""
    return [kept for row in mixed(random, data, image=2.0) for kept in _drifted(row, random)]


def flash(random: Random, data: Path | None) -> list[Row]:
    """`mixed` with three times the small models and images, and twice the chats, for two minutes."""
    begin, end = FLASH
    rows = mixed(random, data)
    more = {"chat": 1, "big": 0}
    doubled = [row for row in rows if begin <= row["arrival"] < end for _ in range(more.get(row["model"], 2))]
    return rows + [{**row, "arrival": min(row["arrival"] + random.uniform(0, 5), LENGTH)} for row in doubled]


def edge(random: Random, data: Path | None) -> list[Row]:
    """Small models and images, some of them private; no language models."""
    rows = [row for model, rate in (("sentiment.p", 2.0), ("sentiment", 3.0)) for row in _small(model, rate, random)]
    return rows + [row for model, rate in (("image.p", 0.5), ("image", 2.0)) for row in _images(model, rate, random)]


def arrivals(make: Callable[[Random, Path | None], list[Row]], seed: Sequence[int], data: Path | None) -> Trace:
    """The trace of a trial, with `data` the folder of the Azure traces, if there is one."""
    return make_trace(make(np.random.default_rng(seed), data))


def _small(model: str, rate: float, random: Random) -> Iterator[Row]:
    times = _poisson(rate, random)
    return _requests(model, times, np.ones(len(times)), np.zeros(len(times)), random)


def _images(model: str, rate: float, random: Random) -> Iterator[Row]:
    times = _poisson(rate, random)
    return _requests(model, times, random.integers(IMAGE_ROWS[0], IMAGE_ROWS[1] + 1, len(times)), 0 * times, random)


def _language(model: str, kind: Language, load: float, random: Random, data: Path | None) -> Iterator[Row]:
    """`load` times the requests of the Azure trace, or of the synthetic one."""
    if data is None:
        seed = int(random.integers(10**9))
        drawn = synthetic_trace(f"{kind.spec},duration={LENGTH},seed={seed}", model=model)
        kept = random.random(len(drawn)) < load
        times, size, output = drawn.arrival[kept], np.minimum(drawn.size, LONGEST)[kept], drawn.output[kept]
    else:
        times, size, output = _of_azure(read_trace(data / kind.file, model=model), load, random)
    return _requests(model, times, size, np.maximum(output, 1), random)


def _of_azure(trace: Trace, load: float, random: Random) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    rows = np.flatnonzero((trace.arrival >= AZURE_BEGINS) & (trace.arrival < AZURE_BEGINS + LENGTH))
    picked = random.choice(rows, int(len(rows) * load), replace=load > 1)
    moved = trace.arrival[picked] - AZURE_BEGINS + random.uniform(-AZURE_SHIFT, AZURE_SHIFT, len(picked))
    return np.clip(moved, 0, LENGTH), trace.size[picked], trace.output[picked]


def _poisson(rate: float, random: Random) -> NDArray[Any]:
    return random.uniform(0, LENGTH, int(rate * LENGTH))


def _requests(
    model: str, times: NDArray[Any], size: NDArray[Any], output: NDArray[Any], random: Random
) -> Iterator[Row]:
    terms = TERMS[model]
    services = random.choice(len(SERVICES), len(times), p=SHARES)
    columns: Iterable[tuple[float, float, float, int]] = zip(times, size, output, services, strict=True)
    for at, rows, tokens, service in columns:
        deadline = terms.due[service] + (terms.per_token * tokens if service == 0 else 0.0)
        yield {
            "arrival": float(at),
            "model": model,
            "size": int(rows),
            "output": int(tokens),
            "deadline": deadline,
            "service": int(service),
        }


def _drifted(row: Row, random: Random) -> list[Row]:
    share = min(max((row["arrival"] - LENGTH / 2) / 90, 0.0), 1.0)
    if row["model"] in ("chat", "big"):
        return [row] if random.random() < 1 - 0.5 * share else []
    if row["model"] == "image" and random.random() < share:
        return [row, {**row, "arrival": min(row["arrival"] + random.uniform(0, 5), LENGTH)}]
    return [row]


FLEETS = Path(__file__).parent / "fleets"


@dataclass(frozen=True, slots=True)
class Trial:
    """A fleet file, what arrives, and what happens to the fleet meanwhile."""

    name: str
    file: str
    make: Callable[[Random, Path | None], list[Row]]
    events: tuple[HardwareChange, ...] = ()

    def fleet(self) -> FileFleet:
        """The fleet, with the trial's events."""
        return replace(load_fleet(FLEETS / self.file), events=self.events)

    def trace(self, seed: int, data: Path | None = None) -> Trace:
        """What arrives with a seed, with `data` the folder of the Azure traces, if there is one."""
        return arrivals(self.make, (seed, *self.name.encode()), data)

    def workload(self, trace: Trace) -> Workload:
        """A trace on the trial's fleet."""
        return prepare(trace, self.fleet(), seed=1)


THROTTLED = HardwareChange(at=LENGTH / 2, hardware_class="gpu.l4", slower=3.0)

MISPROFILED = HardwareChange(at=0.0, hardware_class="gpu.l4", slower=2.0)

RECLAIMED = (
    HardwareChange(at=300.0, hardware_class="l4.spot", reclaimed=True),
    HardwareChange(at=300.0, hardware_class="l4.spot", available=0),
    HardwareChange(at=480.0, hardware_class="l4.spot", available=6),
    HardwareChange(at=600.0, hardware_class="gpu.l4", available=3),
)

TRIALS: Mapping[str, Trial] = {
    trial.name: trial
    for trial in (
        Trial("steady", "mixed.yaml", mixed),
        Trial("drift", "mixed.yaml", drift),
        Trial("throttled", "mixed.yaml", mixed, (THROTTLED,)),
        Trial("edge", "edge.yaml", edge),
        Trial("flash", "mixed.yaml", flash),
        Trial("reclaimed", "mixed.yaml", mixed, RECLAIMED),
        Trial("misprofiled", "mixed.yaml", mixed, (MISPROFILED,)),
    )
}
