"""The product's own decision, `router.placement.choose`, on boards laid out from the simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from router.board import Board
from router.classify import Candidate, Constraints, Needs
from router.placement import RESERVED_SHARE, Placement, choose
from simulator.fleet import SERVICES, DeviceClass
from simulator.policies.blind import LIVE
from simulator.policies.policy import REFUSED, ByLevel, able
from simulator.pool import LEVELS, Pool
from simulator.workload import Job, Workload
from tasks.catalogue import Model, Profile, TensorSpec, Variant
from tasks.document import Size
from tasks.topology import HardwareClass
from taxiway.errors import OverloadedError

FIRST_RESIDUAL = 2.0
"""Observed over expected seconds that is allowed for until some were seen (DESIGN §7: R starts at 2.0)."""

SURE = 0.9
"""Share of jobs whose observed seconds a guarantee shall cover."""

PACE = 0.02
"""How far one observation moves the residual."""


_ENDLESS = 1e9
_ENDED = -1.0  # a horizon that every queue is past: whether a reserved class is busy is judged here


class Taxiway(ByLevel):
    """`router.placement.choose`, the decision that the router takes.

    Spot classes are for preemptible services alone. A class without devices counts as cold, with its start as the load
    time. Where nothing is in time for live work, a cold class is woken that would be once it is on; what no queue can
    take in time is refused as the router refuses it. Residuals are quantiles of observed over expected seconds, one a
    class and level: deadlines tell of sizes, so that one residual for all levels makes every class look safe for those
    that it is not.
    """

    def __init__(self, workload: Workload) -> None:
        self._classes = workload.fleet.classes
        self._models = workload.trace.models
        self._preemptible = [service.preemptible for service in workload.fleet.services]
        self._boards: dict[tuple[int, bool], Board] = {}
        self._residual = [[FIRST_RESIDUAL] * LEVELS for _ in self._classes]

    def choose(self, job: Job, pools: Sequence[Pool], now: float) -> int:
        """As `Policy.choose`."""
        preemptible = self._preemptible[job.service]
        mine = [pool for pool in able(job, pools) if preemptible or not pool.spot]
        if not mine:
            return REFUSED
        board = self._laid_out(job, mine)
        needs = Needs(job.deadline, job.level, 1, 1.0, constraints=Constraints(service=SERVICES[job.service]))
        work = np.array([_ahead(pool) for pool in mine])
        try:
            placement = choose(board, needs, work, seed=job.index)
        except OverloadedError:
            return _woken(job, mine, REFUSED)
        chosen = mine[placement.index]
        if job.service == LIVE and _late(placement):
            return _woken(job, mine, chosen.index)
        job.expected = float(placement.figures.finish[placement.index])
        return chosen.index

    def ended(self, job: Job, pool: Pool, seconds: float) -> None:
        """As `Policy.ended`."""
        if job.expected:
            learned = self._residual[pool.index]
            over = seconds > learned[job.level] * job.expected
            learned[job.level] *= 1 + PACE * (over - (1 - SURE))

    def _laid_out(self, job: Job, mine: Sequence[Pool]) -> Board:
        """The model's board as it is for this job: sizes differ in two ways, prompt and output, so each has its own.

        The batch that the board expects is the company that the job would find: its limit, for an endless rate.
        """
        kind = (job.model, self._preemptible[job.service])
        board = self._boards.get(kind)
        if board is None:
            board = self._boards[kind] = _blank(self._models[job.model], mine, self._classes)
        crowding = [job.crowding[pool.index] for pool in mine]
        alone = [job.alone[pool.index] for pool in mine]
        return replace(
            board,
            servers=np.array([float(pool.serving or 1) for pool in mine]),
            warm=np.array([1.0 if pool.serving else 0.0 for pool in mine]),
            load=np.array([0.0 if pool.serving else self._classes[pool.name].start for pool in mine]),
            base=np.array(alone) - crowding,
            slope=np.array(crowding),
            residual=np.array([self._residual[pool.index][job.level] for pool in mine]),
            limit=np.array([_company(pool) for pool in mine]),
            reserved=np.array([self._kept_from(job, pool) for pool in mine]),
        )

    def _kept_from(self, job: Job, pool: Pool) -> bool:
        """Whether the class is kept for another service and busy, by the router's measure; what runs is work, too."""
        device = self._classes[pool.name]
        if device.reserve_for in (None, SERVICES[job.service]) or not pool.serving:
            return False
        return (sum(pool.queued) + pool.inside) / pool.serving > RESERVED_SHARE * device.horizon


def _company(pool: Pool) -> float:
    """Jobs on a device of the class, this one among them."""
    return min((pool.running + pool.waiting) / pool.serving + 1.0, pool.slots) if pool.serving else 1.0


def _ahead(pool: Pool) -> list[float]:
    """Device seconds before a new job, one figure a level; what runs counts where there is no room beside it."""
    if pool.running < pool.serving * pool.slots or not pool.running:
        return pool.queued
    return [pool.queued[0] + pool.inside / pool.running, *pool.queued[1:]]


def _late(placement: Placement) -> bool:
    deadline = placement.needs.deadline
    return deadline is not None and bool(placement.figures.finish[placement.index] > deadline)


def _woken(job: Job, mine: Sequence[Pool], otherwise: int) -> int:
    cold = [pool for pool in mine if not pool.serving and job.alone[pool.index] <= job.deadline]
    return min(cold, key=lambda pool: (pool.cost(job), pool.index)).index if cold else otherwise


def _blank(name: str, mine: Sequence[Pool], classes: Mapping[str, DeviceClass]) -> Board:
    """A board with what does not change: prices, starts, reclaims. No links, shadow prices or reserved classes."""
    model = _model(name)
    devices = [classes[pool.name] for pool in mine]
    zero, count = np.zeros(len(mine)), len(mine)
    return Board(
        model=model,
        classes=tuple(pool.name for pool in mine),
        candidates=tuple(_candidate(model, pool.name, device) for pool, device in zip(mine, devices, strict=True)),
        refusals=(),
        warnings=(None,) * count,
        queue=np.arange(count),
        servers=np.ones(count),
        live=np.ones(count, bool),
        reserved=np.zeros(count, bool),
        warm=zero,
        base=zero,
        step=zero,
        slope=zero,
        floor=zero,
        load=zero,
        residual=np.ones(count),
        limit=np.ones(count),
        forming=zero,
        horizon=np.full(count, _ENDED),
        dollars=np.array([device.usd_per_second for device in devices]),
        shadow=zero,
        spot_loss=np.array([device.reclaims_per_hour * device.spot / 3600 for device in devices]),
        link_delay=zero,
        link_seconds=zero,
        egress=zero,
        rates=np.full((2, count), _ENDLESS),
        sharers=_ENDLESS,
        stale=False,
    )


def _candidate(model: Model, name: str, device: DeviceClass) -> Candidate:
    hardware = HardwareClass(
        device="cpu", runtimes=("echo",), max_batch=device.max_batch, max_wait=device.max_wait, price=device.price
    )
    return Candidate(name, hardware, model.reference, model.variants[model.reference], ())


def _model(name: str) -> Model:
    """A stand-in: the board reads only its name."""
    tensor = TensorSpec("rows", "FP32", (-1,))
    variant = Variant(runtime="echo", memory=Size(0), profiles={"cpu": Profile(0.0, 0.0)})
    return Model(
        name=name,
        version=1,
        summary="",
        licence="",
        pipeline="tensors",
        inputs=(tensor,),
        outputs=(tensor,),
        variants={"default": variant},
        reference="default",
    )
