"""What this fleet would promise a peer now. Pure: the placements that it would make, as lines through three of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from router.decide.classify import Needs, needs_of
from router.decide.cost import work_in_full_batches
from router.decide.placement import Placement, choose
from router.decide.working_snapshot import WorkingSnapshot
from tasks.heartbeat import three_digits
from tasks.models.model import Model, generates
from tasks.topology import Topology
from taxiway.contract.peers import SiteOffer
from taxiway.contract.request import Terms
from taxiway.errors import TaxiwayError

_FASTEST = 1e9  # rows a second


def offers_of(
    model: Model, terms: Terms, services: Iterable[str], topology: Topology, working: WorkingSnapshot
) -> dict[str, SiteOffer]:
    """The offers of a model to the tenant of the terms, by service; without those that would be refused or held.

    The service without a name is the default one. Services that this fleet does not have are left out.
    """
    known = ["", *(name for name in services if name in topology.service)]
    asked = {name: Terms(tenant=terms.tenant, locality=terms.locality, service=name or None) for name in known}
    made = {name: _offer(model, one, topology, working) for name, one in asked.items()}
    return {name: offer for name, offer in made.items() if offer is not None}


def _offer(model: Model, terms: Terms, topology: Topology, working: WorkingSnapshot) -> SiteOffer | None:
    """An offer from the placements of three requests that differ in what is read or written."""
    read, written = _usual(model)
    sizes = [(read, written), (2 * read, written), (read, 2 * written)]
    try:
        needs = [_needs(model, terms, topology, *size) for size in sizes]
        placed = [_placed(model, one, working, terms.tenant) for one in needs]
    except TaxiwayError:  # nothing can take it now
        return None
    if any(one.held for one in placed):
        return None
    base, each_read, each_written = map(three_digits, _line([one.finish for one in placed], read, written))
    usd, usd_read, usd_written = map(three_digits, _line([one.cost for one in placed], read, written))
    bound = three_digits(max(1.0, *(one.at_most / max(one.finish, 1e-9) for one in placed)))
    table, index = placed[0].table, placed[0].index
    work = work_in_full_batches(table, placed[0].needs, table.limit)[index]
    rate = three_digits(min(float(table.servers[index]) / max(float(work), 1e-9), _FASTEST))  # rows a second
    return SiteOffer(base, each_read, each_written, bound, usd, usd_read, usd_written, rate)


def _usual(model: Model) -> tuple[float, float]:
    """How much a request of the model's usual size reads and writes: about as much where it generates."""
    size = float(model.expected_size)
    return (max(size // 2, 1.0), max(size // 2, 1.0)) if generates(model) else (size, 0.0)


def _needs(model: Model, terms: Terms, topology: Topology, read: float, written: float) -> Needs:
    needs = needs_of(terms, topology, rows=1, size=read + written, locality=model.locality)
    return replace(needs, output=int(written), longest=int(written))


def _placed(model: Model, needs: Needs, working: WorkingSnapshot, tenant: str) -> Placement:
    ahead = working.ahead(released=working.tenants.shares.bypasses_holding(tenant))
    return choose(working.table(model, needs.constraints), needs, ahead, seed=0)


def _line(values: list[float], read: float, written: float) -> tuple[float, float, float]:
    """The base, and what each unit read and written adds, none below 0: of values at the three sizes."""
    first, more_read, more_written = values
    each_read = max((more_read - first) / read, 0.0)
    each_written = max((more_written - first) / written, 0.0) if written else each_read
    return max(first - each_read * read - each_written * written, 0.0), each_read, each_written


def changed(before: Mapping[str, Mapping[str, SiteOffer]], after: Mapping[str, Mapping[str, SiteOffer]]) -> bool:
    """Whether a peer should hear of it: a model or service came or went, or a figure changed by more than a tenth."""
    return _names(before) != _names(after) or any(
        _differs(offer, after[model][service]) for model, made in before.items() for service, offer in made.items()
    )


def _names(offers: Mapping[str, Mapping[str, SiteOffer]]) -> set[tuple[str, str]]:
    return {(model, service) for model, made in offers.items() for service in made}


def _differs(one: SiteOffer, other: SiteOffer) -> bool:
    pairs = ((getattr(one, name), getattr(other, name)) for name in one.__struct_fields__)
    return any(abs(before - after) > 0.1 * max(before, after) for before, after in pairs)
