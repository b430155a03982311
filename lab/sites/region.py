"""All sites in one event loop, with the lines between them, and what became of every request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from lab.sites.site import PRIVATE, Line, PeerPool, Site, fleet_of
from simulator.engine import ANSWERED, EventQueue, OutcomeColumns
from simulator.traces import Trace
from simulator.workload import SimulatedJob, prepare
from tasks.topology import Topology
from taxiway.contract.peers import OFFER_EVERY


class Region(EventQueue):
    """One run. A tenant's requests arrive at the site of its name.

    If there is only one site, all arrive there, `away` seconds from their callers: none if they are private.
    `outcome` has the states and the latencies as callers see them; `elsewhere` whether a peer answered; `sent` whether
    the request crossed a line between sites at all. `cost` is US dollars for the devices of all sites, once it has run.
    """

    def __init__(
        self, sites: Iterable[Topology], trace: Trace, lines: Mapping[frozenset[str], Line], *, away: float = 0.0
    ) -> None:
        super().__init__()
        self._trace, self._lines = trace, lines
        private = np.array([tenant.endswith(PRIVATE) for tenant in trace.tenants])[trace.tenant]
        self.away = np.where(private, 0.0, away)
        self.outcome = OutcomeColumns(len(trace))
        self.sent, self.elsewhere = np.zeros((2, len(trace)), np.bool_)
        self.cost = 0.0
        self._left = len(trace)
        self._visits: dict[tuple[str, int], tuple[PeerPool, SimulatedJob]] = {}
        self._sites = {
            topology.site: Site(
                topology, prepare(trace, fleet_of(topology)), self, partial(self._ended, topology.site), seed=number
            )
            for number, topology in enumerate(sites)
        }

    def run(self) -> None:
        """Play until the last request has ended."""
        for number, (name, site) in enumerate(self._sites.items()):
            site.begin(
                {peer: self._line(name, peer) for peer in self._sites if peer != name}, partial(self._send, name)
            )
            if len(self._sites) > 1:
                self._later(OFFER_EVERY * number / len(self._sites), partial(self._publish, name))
        for index, arrival in enumerate(self._trace.arrival.tolist()):
            self.process_until(arrival)
            self._arrive(index, arrival)
        while self._left:
            self.process_next()
        self.cost = sum(site.close(self.now) for site in self._sites.values())

    def _later(self, time: float, call: Callable[[float], None]) -> None:
        self.at(time, lambda device, version, now: call(now), None, 0)

    def _line(self, one: str, other: str) -> Line:
        return self._lines[frozenset((one, other))]

    def _tenant(self, index: int) -> str:
        return str(self._trace.tenants[self._trace.tenant[index]])

    def _arrive(self, index: int, now: float) -> None:
        home = self._sites.get(self._tenant(index).removesuffix(PRIVATE)) or next(iter(self._sites.values()))
        away = float(self.away[index])
        left = float(self._trace.deadline[index]) - 2 * away
        if away:
            self._later(now + away, partial(home.accept, index, left))
        else:
            home.accept(index, left, now)

    def _publish(self, name: str, now: float) -> None:
        """A site says what it offers to all whose line to it is not cut."""
        self._later(now + OFFER_EVERY, partial(self._publish, name))
        offers = self._sites[name].offers(now)
        for other, site in self._sites.items():
            pool = site.peer(name)
            if offers is not None and pool is not None and not self._line(name, other).is_cut(now):
                self._later(self._line(name, other).arrival(now), partial(pool.hear, offers))

    def _send(self, home: str, pool: PeerPool, job: SimulatedJob, now: float) -> None:
        self.sent[job.index] = True
        self._later(self._line(home, pool.name).arrival(now), partial(self._visit, pool, job, job.due - now))

    def _visit(self, pool: PeerPool, job: SimulatedJob, left: float, now: float) -> None:
        self._visits[pool.name, job.index] = pool, job
        self._sites[pool.name].accept(job.index, left, now)

    def _ended(self, name: str, index: int, state: int) -> None:
        """A request has ended at a site: its caller hears of it, or the site that sent it."""
        visit = self._visits.pop((name, index), None)
        if visit is not None:
            pool, job = visit
            self.elsewhere[index] = state == ANSWERED
            self._later(pool.received.line.arrival(self.now), partial(pool.answered, job, state))
            return
        self._left -= 1
        latency = self.now + float(self.away[index]) - float(self._trace.arrival[index])
        self.outcome.close(index, state, latency if state == ANSWERED else math.nan)
