"""Loaded variants, and what was learned of their times on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.heartbeat import ANY, three_digits
from tasks.models.catalogue import Catalogue
from tasks.models.discovered import Announced
from tasks.models.model import Model, Variant
from tasks.models.profiles import UNSURE, KnownProfile, ran_size
from workers.decide.occupation import Histograms, Track, begin, observe, seen, unseen, wary
from workers.device import Device
from workers.port import Interruptible, Item, Pipeline, Row, Runtime

TELLING = 0.002
"""Shortest prediction, in seconds, of a batch or job that tells of the device: what takes microseconds tells of the
processes around it."""


@dataclass(slots=True, eq=False)
class Loaded:
    """A loaded variant, with what is known of its performance on the device."""

    key: str
    model: Model
    variant: Variant
    pipeline: Pipeline
    runtime: Runtime
    known: KnownProfile
    seconds: float
    """Load time without one-time work (fetching artefacts, importing the runtime)."""
    in_use: bool = False
    """It is not unloaded now."""
    ran: bool = False
    """A batch has run on it."""
    urgent: bool = False
    """Rows for which somebody waits have run on it."""
    interruptible: Interruptible | None = field(init=False)
    """Its runtime, if that runs rows one by one in a separate process."""

    def __post_init__(self) -> None:
        self.interruptible = self.runtime if isinstance(self.runtime, Interruptible) else None  # costs microseconds


class LearnedTimes:
    """Each variant's times against its profile, since this process started. Reading them is thread-safe.

    Under `ANY` is what was learned of all variants together. `discovered` has the models that an endpoint serves
    without a model.yaml, by name.
    """

    def __init__(self) -> None:
        self.discovered: Mapping[str, Announced] = {}
        self._tracks: dict[str, Track] = {}
        self._jobs: dict[str, Histograms] = {}  # of the seconds from placement to result over those expected
        self._loads: dict[str, Track] = {}

    def track(self, loaded: Loaded) -> Track:
        """The variant's times against its profile."""
        return self._tracks.get(loaded.key) or begin(loaded.known.residual)

    def pace(self, key: str) -> float:
        """Recent times of a variant, as a multiple of its profile."""
        track = self._tracks.get(key)
        return 1.0 if track is None else track.pace

    def predicted(self, loaded: Loaded, items: Sequence[Item]) -> float:
        """The seconds of a batch, at the variant's recent pace. Thread-safe."""
        size = sum(item.size for item in items) / len(items)
        return self.pace(loaded.key) * loaded.known.profile.latency(len(items), size)

    def observe(
        self, loaded: Loaded, items: Sequence[Item], answers: Sequence[Row], *, rows: int, seconds: float
    ) -> None:
        """Learn from items that ran in a batch of `rows` and took `seconds`."""
        sizes = [ran_size(loaded.model, i.size, i.parameters, answer) for i, answer in zip(items, answers, strict=True)]
        predicted = loaded.known.profile.latency(rows, sum(sizes) / len(sizes))
        levels = {item.level for item in items}
        self._tracks[loaded.key] = observe(self.track(loaded), predicted=predicted, seconds=seconds, levels=levels)
        self._observe_device(predicted, seconds)

    def _observe_device(self, predicted: float, seconds: float) -> None:
        if predicted >= TELLING:
            usual = self._tracks.get(ANY) or Track()
            self._tracks[ANY] = observe(usual, predicted=predicted, seconds=seconds, levels=())

    def judge(self, key: str, level: int, *, expected: float, seconds: float) -> None:
        """Learn from a job that took so many seconds from its placement. Only who writes results."""
        for name in (key, ANY) if expected >= TELLING else (key,):
            self._jobs[name] = seen(self._jobs.get(name) or unseen(UNSURE), seconds / max(expected, 1e-6), {level})

    def loaded_in(self, loaded: Loaded, *, computes: bool) -> None:
        """Learn from a load; where it `computes` on the device itself, it tells of the pace there, too."""
        predicted, seconds = loaded.known.profile.load, loaded.seconds
        for key in (loaded.key, ANY):
            self._loads[key] = observe(self._loads.get(key) or Track(), predicted=predicted, seconds=seconds, levels=())
        if computes:
            self._observe_device(predicted, seconds)

    def reported(self, loaded: Iterable[Loaded]) -> dict[str, Any]:
        """The fields of `DeviceFacts` for what was learned; paces and residuals of these variants. Thread-safe."""
        tracks = {one.key: self._tracks[one.key] for one in loaded if one.key in self._tracks}
        common = {ANY: self._tracks[ANY]} if ANY in self._tracks else {}
        judged = {*tracks, *(self._jobs.keys() & {ANY, *(one.key for one in loaded)})}
        return {
            "pace": _paces(tracks | common),
            "loading": _paces(dict(self._loads)),
            "residual": {key: self._residuals(tracks.get(key), self._jobs.get(key)) for key in sorted(judged)},
            "drifted": tuple(sorted(key for key, track in tracks.items() if track.drifted)),
        }

    def _residuals(self, track: Track | None, jobs: Histograms | None) -> tuple[float, ...]:
        """The larger of those of batches and of jobs, by level, without repeated values at the end."""
        of_jobs = wary(jobs or unseen(UNSURE))
        found = [three_digits(max(pair)) for pair in zip(of_jobs, track.residuals if track else of_jobs, strict=True)]
        while len(found) > 1 and found[-1] == found[-2]:
            found.pop()
        return tuple(found)


class DeviceVariants(LearnedTimes, ABC):
    """The variants that a device runs now, and what is known of them. Thread-safe.

    `unavailable` maps the keys of variants that it cannot run to the reason.
    """

    device: Device
    unavailable: dict[str, str]
    _catalogue: Catalogue | None = None

    def is_current(self, model: Model) -> bool:
        """Whether the catalogue has exactly this model; always true until a catalogue is set (`renew`)."""
        return self._catalogue is None or self._catalogue.models.get(model.id) is model

    @abstractmethod
    def ready(self, model: Model, variant: str) -> Loaded | None:
        """The variant, if it can run now as described by exactly this model."""

    @abstractmethod
    def all_loaded(self) -> list[Loaded]:
        """Every variant that can run now."""

    @abstractmethod
    def lacks(self, key: str, reason: str) -> None:
        """Record that a requested variant is not in this worker's catalogue."""

    @abstractmethod
    def known(self, model: Model, name: str) -> KnownProfile:
        """The variant's profile on this device."""

    @abstractmethod
    def memory_used(self) -> int:
        """Bytes that the variants hold on the device."""


def _paces(tracks: Mapping[str, Track]) -> dict[str, float]:
    """The pace of each variant that has run, as heartbeats report it."""
    ran = {key: track for key, track in tracks.items() if track.batches}
    return {key: three_digits(track.hedged if key == ANY else track.pace) for key, track in ran.items()}
