"""What a candidate would take: seconds until the answer, and US dollars (DESIGN §7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from router.classify import Candidate, Needs
from router.fleet import FleetSnapshot
from tasks.catalogue import Model, Profile
from tasks.facts import variant_key
from tasks.topology import DeviceKind


@dataclass(frozen=True, slots=True)
class Estimate:
    """A candidate's figures: seconds for each part, device seconds used up, US dollars.

    `warm` says that some device already holds the variant; `live` that some device is there at all.
    """

    wait: float
    forming: float
    load: float
    run: float
    work: float
    cost: float
    warm: bool
    live: bool

    @property
    def finish(self) -> float:
        """Seconds until the answer."""
        return self.wait + self.forming + self.load + self.run


def estimate(candidate: Candidate, model: Model, needs: Needs, fleet: FleetSnapshot) -> Estimate:
    """The candidate's figures under the present load.

    Run time is the mean over the devices that hold the variant, else over all, each by its own kind's profile and by
    the pace it observed. With no live device, the class's own kind is assumed.
    """
    hardware = candidate.hardware
    key = variant_key(model.id, candidate.variant_name)
    warm = tuple(d for d in candidate.devices if key in d.warm)
    limit = min(hardware.max_batch, candidate.variant.max_batch or hardware.max_batch)
    runs = [
        d.pace.get(key, 1.0) * _in_batches(_profile(candidate, d.kind), needs, limit) for d in warm or candidate.devices
    ]
    work = _mean(runs) if runs else _in_batches(_profile(candidate, hardware.device), needs, limit)
    loads = [_profile(candidate, d.kind).load for d in candidate.devices]
    load = 0.0 if warm else max(loads, default=_profile(candidate, hardware.device).load)
    return Estimate(
        wait=fleet.ahead(candidate.hardware_class, needs.level) / (len(candidate.devices) or 1),
        forming=hardware.max_wait,
        load=load,
        run=work,
        work=work,
        cost=hardware.price.usd_per_hour / 3600 * (work + load),
        warm=bool(warm),
        live=bool(candidate.devices),
    )


def _mean(figures: Sequence[float]) -> float:
    """The mean, the same in any order: `fsum` rounds once."""
    return math.fsum(figures) / len(figures)


def _profile(candidate: Candidate, kind: DeviceKind) -> Profile:
    """The variant's profile on a kind of device; the CPU's where a class of that kind is emulated."""
    profiles = candidate.variant.profiles
    return profiles[kind] if kind in profiles else profiles["cpu"]


def _in_batches(profile: Profile, needs: Needs, limit: int) -> float:
    """Seconds that the rows take in batches of at most `limit`."""
    full, rest = divmod(needs.rows, limit)
    return full * profile.latency(limit, needs.size) + (profile.latency(rest, needs.size) if rest else 0.0)
