"""Interfaces of stage 3, which the other stages and the heartbeat use.

`stages.device` with `workers.executor` implements them for a device of this machine, `workers.endpoints` for an
endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from broker.valkey.worker import Store
from tasks.heartbeat import EndpointFacts
from tasks.models.catalogue import Catalogue, Model
from tasks.models.discovered import Announced
from tasks.models.profiles import Known, ProfileBook
from workers.decide.pace import Track
from workers.device import Device
from workers.executor import Loaded


class DeviceVariants(Protocol):
    """The variants that a device runs now, and what is known of them. Thread-safe.

    `unavailable` maps the keys of variants that it cannot run to the reason, and `discovered` has the models that an
    endpoint serves without a model.yaml, by name.
    """

    unavailable: dict[str, str]
    discovered: Mapping[str, Announced]

    @property
    def device(self) -> Device:
        """The device."""

    def ready(self, model: Model, variant: str) -> Loaded | None:
        """The variant, if it can run now as described by exactly this model."""

    def all_loaded(self) -> list[Loaded]:
        """Every variant that can run now."""

    def lacks(self, key: str, reason: str) -> None:
        """Record that a requested variant is not in this worker's catalogue."""

    def known(self, model: Model, name: str) -> Known:
        """The variant's profile on this device."""

    def track(self, loaded: Loaded) -> Track:
        """The variant's times against its profile, since this process started."""

    def pace(self, key: str) -> float:
        """Recent times of a variant, as a multiple of its profile."""

    def memory_used(self) -> int:
        """Bytes that the variants hold on the device."""


class DeviceDriver(Protocol):
    """Stage 3. Thread-safe, except for `warm_up` and `run`.

    `ahead` is the maximum seconds of patient work that may wait here, `running` the rows on the device now.
    """

    store: Store
    ahead: float
    running: int

    @property
    def variants(self) -> DeviceVariants:
        """What the device runs."""

    @property
    def fault(self) -> str:
        """Why the device takes no work now, though its worker does; empty if it takes some."""

    @property
    def endpoint(self) -> EndpointFacts | None:
        """What is known of the endpoint that the device is; None for other devices."""

    def warm_up(self, models: Sequence[Model]) -> None:
        """Prepare the device for these models, before `run`."""

    def run(self) -> None:
        """Run admitted jobs until stopped, then finish what ends in time."""

    def stop(self) -> None:
        """Run the jobs here that end in time, requeue the rest, and end."""

    def renew(self, catalogue: Catalogue, book: ProfileBook, *, warm: Sequence[Model]) -> None:
        """Switch to a new catalogue and profiles, and keep these models warm."""

    def wait_for_room(self, longest: float) -> int:
        """Wait until there is room for jobs, at most `longest` seconds; returns for how many."""

    def levels(self) -> int:
        """How many of a queue's priority levels, first ones first, may be fetched."""

    def computed(self, now: float) -> float:
        """Seconds that the device has computed."""

    def batch_age(self, now: float) -> float:
        """Seconds for which the running batch has run, 0 if there is none."""

    def hung(self, now: float) -> bool:
        """Whether the device counts as hung."""

    def occupied(self, now: float) -> float:
        """Device seconds that the running batch will still spend on rows of ended jobs."""

    def blocked(self, now: float) -> tuple[float, int]:
        """Seconds until the device takes work again, and the first level that does not wait; 0 if it takes some now."""

    def blocking(self, now: float) -> dict[str, float]:
        """Seconds that a job of each model may wait for a batch of another."""
