"""Three simulated sites: each request ends once, private ones stay at home, and a cut line leaves sites as alone."""

from itertools import combinations

import numpy as np
import pytest

from lab.sites.hours import STAY, day
from lab.sites.region import Region
from lab.sites.site import PRIVATE, SITES, Line, Site, alone, central, topology_of
from simulator.engine import ANSWERED, WAITING
from simulator.traces import Trace
from tasks.topology import Topology

BEGIN, LENGTH = 450.0, 90.0


@pytest.fixture(scope="module")
def morning() -> Trace:
    """The hours in which the edge is about to be the busiest."""
    trace = day(7, shift=1 / 3)
    return trace.part(np.flatnonzero((trace.arrival >= BEGIN) & (trace.arrival < BEGIN + LENGTH)))


def played(sites: list[Topology], trace: Trace, *, cut: bool = False, away: float = 0.0) -> Region:
    cuts = ((0.0, 1e6),) if cut else ()
    region = Region(sites, trace, {frozenset(pair): Line(0.04, cuts) for pair in combinations(SITES, 2)}, away=away)
    region.run()
    return region


def all_sites() -> list[Topology]:
    return [topology_of(site) for site in SITES]


def private(trace: Trace) -> np.ndarray:
    return np.array([tenant.endswith(PRIVATE) for tenant in trace.tenants])[trace.tenant]


def test_every_request_ends_once_and_work_moves_but_nothing_private(morning: Trace) -> None:
    region = played(all_sites(), morning)
    assert (region.outcome.state != WAITING).all()  # `OutcomeColumns.close` asserts that none ends twice
    assert region.elsewhere.sum() > 100
    assert private(morning).mean() == pytest.approx(STAY, abs=0.05)
    assert not region.sent[private(morning)].any()


def test_what_a_peer_answers_takes_the_line_there_and_back(morning: Trace) -> None:
    region = played(all_sites(), morning)
    assert region.outcome.latency[region.elsewhere].min() >= 0.08
    assert np.nanmin(region.outcome.latency[~region.elsewhere]) < 0.08


def test_sites_whose_lines_are_cut_answer_as_sites_alone(morning: Trace) -> None:
    cut, single = played(all_sites(), morning, cut=True), played([alone(one) for one in all_sites()], morning)
    assert not cut.sent.any()
    assert np.array_equal(cut.outcome.state, single.outcome.state)
    assert np.allclose(cut.outcome.latency, single.outcome.latency, equal_nan=True)
    assert cut.cost == pytest.approx(single.cost)


def test_callers_of_a_central_fleet_pay_the_line_and_private_requests_run_at_their_site(
    morning: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: dict[int, str] = {}
    end = Site.end

    def noted(self: Site, job, pool, now, *, answered) -> None:  # type: ignore[no-untyped-def]  # passed on as it is
        places[job.index] = pool.name
        end(self, job, pool, now, answered=answered)

    monkeypatch.setattr(Site, "end", noted)
    region = played([central(all_sites())], morning, away=0.04)
    answered, stay = region.outcome.state == ANSWERED, private(morning)
    assert region.outcome.latency[answered & ~stay].min() >= 0.08
    for index in np.flatnonzero(answered & stay).tolist():
        assert places[index].startswith(morning.tenants[morning.tenant[index]].removesuffix(PRIVATE))
