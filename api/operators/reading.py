"""Reads the fleet for operators: one `FleetView` from the router's parts and the state store."""

from __future__ import annotations

import msgspec

from api.operators.problems import problems
from api.operators.view import FleetView, view_fleet, view_plan
from api.routing.router import HttpRouter
from tasks.models.folder import APART


async def read_fleet(router: HttpRouter) -> FleetView:
    """The fleet now, with what needs attention.

    Raises:
        BrokerUnavailableError: the state store does not answer.
    """
    topology, catalogue = router.rules.topology, router.rules.catalogue
    view = await view_fleet(topology, router.fleet, router.queue_mover, router.scaler.targets(), router.store)
    reports = await router.store.fleet.catalogues()
    tuner, latest = await router.store.fleet.tuner()
    waiting, given_up = await router.webhooks.figures()
    failing = await router.store.fleet.failing()
    view = msgspec.structs.replace(
        view,
        webhooks_waiting=waiting,
        webhooks_dead=given_up,
        tokens=sum(use.input + use.output for use in router.outcomes.used.values()),
        disabled=catalogue.disabled,
        outdated=catalogue.outdated,
        unloaded=tuple(sorted(router.rules.unloaded & catalogue.models.keys())),
        restart=tuple(name for name, report in sorted(reports.items()) if report.queues_changed),
        queues_wrong={name: report.queues_wrong for name, report in sorted(reports.items()) if report.queues_wrong},
        clocks={name: report.clock for name, report in sorted(reports.items()) if abs(report.clock) >= APART},
        plan=view_plan(
            router.fleet.followed,
            router.fleet.snapshot,
            view.now,
            reports.values(),
            tuner,
            latest,
            topology.plan.period,
        ),
        ended=router.lately.ended,
        missed=router.lately.missed,
        failing=failing,
    )
    return msgspec.structs.replace(view, problems=problems(view))
