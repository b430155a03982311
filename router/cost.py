"""What a candidate would take: seconds until the answer, and US dollars (DESIGN §7)."""

from __future__ import annotations

from dataclasses import dataclass

from router.classify import Candidate, Needs
from router.fleet import FleetSnapshot
from tasks.catalogue import Model, Profile
from tasks.facts import variant_key


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

    A warm device's profile is corrected by the pace it observed. With no live device, the class's own kind is assumed.
    """
    hardware, variant = candidate.hardware, candidate.variant
    key = variant_key(model.id, candidate.variant_name)
    warm = [d for d in candidate.devices if key in d.warm]
    profile = _profile(candidate)
    pace = sum(d.pace.get(key, 1.0) for d in warm) / len(warm) if warm else 1.0
    limit = min(hardware.max_batch, variant.max_batch or hardware.max_batch)
    work = pace * _in_batches(profile, needs, limit)
    servers = len(candidate.devices) or 1
    load = 0.0 if warm else profile.load
    return Estimate(
        wait=fleet.ahead(candidate.hardware_class, needs.level) / servers,
        forming=hardware.max_wait,
        load=load,
        run=work,
        work=work,
        cost=hardware.price.usd_per_hour / 3600 * (work + load),
        warm=bool(warm),
        live=bool(candidate.devices),
    )


def _profile(candidate: Candidate) -> Profile:
    profiles = candidate.variant.profiles
    kind = candidate.devices[0].kind if candidate.devices else candidate.hardware.device
    return profiles[kind] if kind in profiles else profiles["cpu"]


def _in_batches(profile: Profile, needs: Needs, limit: int) -> float:
    """Seconds that the rows take in batches of at most `limit`."""
    full, rest = divmod(needs.rows, limit)
    return full * profile.latency(limit, needs.size) + (profile.latency(rest, needs.size) if rest else 0.0)
