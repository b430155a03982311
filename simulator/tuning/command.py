"""`python -m simulator tune`: keeps the fleet's plan. A process of low priority, one at a time in the fleet.

It reads the history of arrivals and the devices from the state store, searches for a better plan in the fleet's twin,
and replaces the stored plan in one step. A tuner that is killed changes nothing.

`python -m simulator.tuning.command` is the same without the simulator's other commands and what they import. Data to
stdout, logs to stderr.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

import click
import msgspec
import numpy as np
from rich.table import Table

from broker.valkey.processes import lease_answer, lease_call, plan_call
from router.decide.plan import STALE, LatestTuning, Plan, follow
from simulator.engine import StuckError
from simulator.own_fleet.history import History
from simulator.own_fleet.known import read_fleet
from simulator.policies.policy import LIVE, Assignment
from simulator.reports import plan_tables
from simulator.traces import TraceError
from simulator.tuning.prior import Prior, displaces, expected, guess, parse_prior
from simulator.tuning.real_fleet import (
    KnownFleet,
    Recorded,
    Shortage,
    billed,
    penalties,
    recorded,
    shortages,
    spending,
    timely,
)
from simulator.tuning.recall import BLOCK, NOW, Traffic, followed
from simulator.tuning.tuner import (
    ALARM_WINDOW,
    FIRST,
    PLAYED_WINDOW,
    REST,
    Decision,
    Trust,
    Tuner,
    TuningWatch,
    lacking,
    plan_of,
)
from simulator.tuning.twin import Window
from tasks.history import LAG, Arrivals, slice_of
from tasks.models.folder import ModelsFolder
from tasks.queues.queues_file import QueuesFile
from tasks.settings import Settings, SettingsError, settings_from
from tasks.telemetry import log_to_stderr
from tasks.topology import Topology, TopologyError, load_topology
from taxiway.cli import USAGE, CommandError, report
from taxiway.cli.show import stdout_console
from taxiway.connection import ConnectionPool
from taxiway.contract.keys import TUNER, TUNERS, TUNING
from taxiway.errors import BrokerUnavailableError

TUNER_LEASE = 120.0
"""Seconds after which another tuner may tune if the one before was killed: a few looks, and a search."""

WAIT = 2.0
"""Seconds between two attempts of a tuner that has to wait for another one, or for the fleet's first device."""

REACH = 3600.0
"""Seconds of earlier arrivals in which a tuner that has just started looks for a time that was like now."""

CPU = 7.0
"""Seconds of processor time of one tuning: its plays are fewer if the last ones took longer."""

HUNG = STALE
"""Seconds that a turn and the rest after it may take: by then routers have dropped the plan."""

KEEP_LATEST = 86400
"""Seconds for which routers can show what was found."""


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What one tuning found."""

    number: int | None
    """Of the plan; None if there is none."""
    adopted: bool
    """Whether another assignment is followed from now on."""
    why: str
    arrivals: int
    # US dollars an hour: of the plan in use, and of the best one found
    before: float | None = None
    after: float | None = None
    plays: float = 0.0
    cpu: float = 0.0
    cells: tuple[str, ...] = ()
    """Requests that prefer another class than before."""


class FleetTuner:
    """Tunes the plan of one fleet. Methods raise `BrokerUnavailableError` while the state store does not answer."""

    def __init__(self, settings: Settings, topology: Topology, prior: Prior | None = None) -> None:
        self._topology = topology
        self._prior: Prior = prior or {}
        self._folder = ModelsFolder(settings.models, QueuesFile(settings.queues))
        self._connections = ConnectionPool(settings.broker, server="state store")
        self._history = History(settings.broker)
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self._short: Mapping[str, Shortage] = {}
        self._each = 0.0
        self._watch: TuningWatch | None = None
        self._good: tuple[Assignment, ...] = ()
        self._models: tuple[str, ...] = ()
        self._trust = Trust()
        self._traffic = Traffic()
        self._played = 0.0
        self._spent, self._seen = 0.0, math.inf
        self.rest = REST
        """Seconds until the next look: until the history is long enough for a first plan, if that is sooner."""

    def lead(self) -> bool:
        """Take or keep the lease; False while another tuner has it."""
        return self._take(TUNER_LEASE)

    def due(self) -> bool:
        """Whether the plan shall be tuned again, by its period or because the fleet is not as it was then."""
        if self._watch is None:
            return True
        now, _, known = self._read()
        recent = timely(self._history.read_recent(now - LAG - ALARM_WINDOW), self._topology)
        live = [in_time for (_, service), in_time in recent if service == LIVE]
        self._spend(known, now)
        self._count(now - LAG - (NOW + 1) * BLOCK, now - LAG)
        # whether requests come as they did at an earlier time, and not as those that were played
        recalls = self._traffic.alike(now - LAG, PLAYED_WINDOW, self._played) is not None
        return self._watch.due(now, known.paces, live, self._topology.plan.period, recalls=recalls)

    def tune(self, *, dry_run: bool) -> tuple[Tuning, Plan | None]:
        """Tune once: what was found, and the plan to follow from now on. A dry run writes nothing."""
        tuning, plan = self._tune(dry_run=dry_run)
        if not dry_run:
            self._tell(tuning)
        return tuning, plan

    def _tune(self, *, dry_run: bool) -> tuple[Tuning, Plan | None]:
        self.rest = REST
        now, raw, known = self._read()
        before, until = follow(raw, now).stored, now - LAG
        if before is not None and self._fails(before, known, now):
            why = "its plan scored worse than predicted for two periods: requests are placed one by one for a period"
            if not dry_run:
                self._write(raw, None)
            self._trust.begin(now, self._spent)
            self._watch = TuningWatch(now, math.inf, known.paces)
            return _unchanged(None, why, 0), None
        found = recorded(self._arrivals(until), known, until)
        arrivals = len(found.workload) if found is not None else 0
        span = found.span if found is not None else 0.0
        if before is not None and before.guessed:  # refused requests are recorded as if they came all through a slice
            span = min(span, max(until - before.made, 0.0))
        pause = lacking(arrivals, span, before)
        if found is None or pause:
            self.rest = pause
            why = f"too few arrivals are recorded: {arrivals} in {span:.0f} s"
            tuning, plan = self._expect(_unchanged(before, why, arrivals), before, known, now)
        else:
            tuning, plan = self._search(found, before, now)
            self._watch = TuningWatch(now, found.span, known.paces)
        if tuning.adopted:
            self._trust.begin(now, self._spent)
        if not dry_run and plan is not None and plan is not before and not self._write(raw, plan):
            return _unchanged(before, "another tuner replaced the plan meanwhile", arrivals), before
        return tuning, plan

    def _expect(
        self, unchanged: Tuning, before: Plan | None, known: KnownFleet, now: float
    ) -> tuple[Tuning, Plan | None]:
        """A plan for what is expected, if none is followed; what is not known is guessed, and no device started for it.

        It is tuned again as soon as there may be a plan from arrivals.
        """
        found = recorded(expected(self._prior, known), known, 0.0) if before is None or before.stale(now) else None
        if found is None or not (self._prior or displaces(found.workload.fleet)):
            if not (known.snapshot.devices or known.snapshot.startable):  # the fleet is just starting
                self.rest = WAIT
            return unchanged, before
        tuning, plan = self._search(found, before, now)
        if not self._prior:
            plan = guess(plan)
        self._watch = TuningWatch(now, FIRST, known.paces)
        why = f"{unchanged.why}, so the plan is for what is expected"
        return msgspec.structs.replace(tuning, why=why, arrivals=unchanged.arrivals), plan

    def close(self) -> None:
        """Let another tuner work, and disconnect."""
        self._take(0.0)
        self._connections.close()
        self._history.close()

    def _take(self, seconds: float) -> bool:
        return bool(lease_answer(self._connections.run(lease_call((TUNER, TUNERS), self._name, seconds))).own)

    def _arrivals(self, until: float) -> Arrivals:
        """What to play: the latest arrivals, or those of an earlier time that was like now, and of the last minutes."""
        if not self._traffic:
            last = slice_of(until)
            for begin in np.arange(last - REACH, last, PLAYED_WINDOW).tolist():
                self._count(begin, begin + PLAYED_WINDOW)
        latest = self._count(until - PLAYED_WINDOW, until)
        alike = self._traffic.alike(until, PLAYED_WINDOW)
        self._played = until - PLAYED_WINDOW if alike is None else alike.begin
        if alike is None:
            return latest
        end = alike.begin + PLAYED_WINDOW
        return followed(self._history.read(alike.begin, end), end, latest, until - alike.recent)

    def _count(self, begin: float, end: float) -> Arrivals:
        """The arrivals of a span, once they count as traffic that was seen."""
        arrivals = self._history.read(begin, end)
        self._traffic.add(arrivals, begin, end)
        return arrivals

    def _fails(self, plan: Plan, known: KnownFleet, now: float) -> bool:
        """Whether the plan did not keep what it promised."""
        self._spend(known, now)
        trust = self._trust
        if not trust.since:  # this process has just started
            trust.begin(now, self._spent)
        if now - trust.since < self._topology.plan.period:
            return False
        ended = self._history.read_recent(trust.since - LAG)
        self._spent += billed(ended, self._topology)
        for cell, in_time in timely(ended, self._topology):
            trust.note(cell, timely=in_time)
        return trust.is_lost(now, self._spent, penalties(self._topology), plan.score)

    def _spend(self, known: KnownFleet, now: float) -> None:
        """Count what the devices have cost since they were last looked at."""
        self._spent += max(now - self._seen, 0.0) / 3600 * spending(known)
        self._seen = now

    def _search(self, found: Recorded, before: Plan | None, now: float) -> tuple[Tuning, Plan]:
        began = time.process_time()
        number = 1 if before is None else before.number + 1
        tuner = Tuner(seed=number)
        tuner.assignment = found.assignment(before)
        first = tuner.assignment is None
        window = Window.latest(found.workload, found.span, found.span)
        window = window.behind(found.workload, found.waiting, found.span)
        if self._models == found.workload.trace.models:
            tuner.good = self._good
        decision = tuner.tune(window, found.conditions, now, most=self._affordable())
        self._good, self._models = tuner.good, found.workload.trace.models
        cpu = time.process_time() - began
        self._each = cpu / max(decision.plays, 1.0)
        twins = plan_of(decision, found.workload.fleet, window, number=number, made=now)
        plan = _still_moving(found.translated(twins), before, now)
        if before is not None and not decision.adopted:
            plan = msgspec.structs.replace(plan, adopted=before.adopted)
        return _told(decision, plan, before, len(window.jobs), cpu, first=first), plan

    def _affordable(self) -> float:
        """Plays for which there is processor time, as the last ones took it."""
        return max(CPU / self._each, 1.0) if self._each else math.inf

    def _read(self) -> tuple[float, bytes, KnownFleet]:
        """The store's time, the stored plan, and what is known of the fleet."""
        self._folder.look()
        now, plan, snapshot = read_fleet(self._connections)
        known = KnownFleet(self._topology, self._folder.catalogue, self._folder.book, snapshot)
        self._short = shortages(self._short, follow(plan, now).plan, known)
        return now, plan, replace(known, short=self._short)

    def _tell(self, tuning: Tuning) -> None:
        """Leave what was found for routers to show."""
        (now,) = self._connections.calls(("TIME",))
        latest = LatestTuning(
            tuner=self._name, at=float(now[0]), adopted=tuning.adopted, why=tuning.why, score=tuning.after
        )
        self._connections.calls(("SET", TUNING, msgspec.json.encode(latest), "EX", KEEP_LATEST))

    def _write(self, before: bytes, plan: Plan | None) -> bool:
        """Store the plan, or that there is none; False if another tuner has replaced it meanwhile."""
        after = msgspec.json.encode(plan) if plan is not None else b""
        return bool(self._connections.run(plan_call(before, after)))


def changed(before: Plan | None, after: Plan) -> tuple[str, ...]:
    """The requests that prefer another class than before, in words."""
    found = []
    for cell in after.cells:
        was = before.cell(cell.model, cell.service, cell.locality) if before is not None else None
        if was is None or was.classes[0] != cell.classes[0]:
            name = " ".join(part for part in (cell.model, cell.service, cell.locality) if part)
            found.append(f"{name}: {f'{was.classes[0]} → ' if was is not None else ''}{cell.classes[0]}")
    return tuple(found)


def _still_moving(plan: Plan, before: Plan | None, now: float) -> Plan:
    """The plan with the handovers of the one before that go on."""
    cells = []
    for cell in plan.cells:
        was = before.cell(cell.model, cell.service, cell.locality) if before is not None else None
        goes_on = was is not None and was.handover is not None and was.handover.latest > now
        if was is not None and goes_on and cell.handover is None and was.classes[0] == cell.classes[0]:
            cell = msgspec.structs.replace(cell, handover=was.handover)
        cells.append(cell)
    return msgspec.structs.replace(plan, cells=tuple(cells))


def _told(decision: Decision, plan: Plan, before: Plan | None, arrivals: int, cpu: float, *, first: bool) -> Tuning:
    gain = 0.0 if first else 1 - decision.after / max(decision.before, 1e-9)
    return Tuning(
        number=plan.number,
        adopted=decision.adopted,
        why="there was no plan for these requests" if first else f"{gain:.0%} better than the plan in use",
        arrivals=arrivals,
        before=None if first else round(decision.before, 3),
        after=round(decision.after, 3),
        plays=round(decision.plays, 1),
        cpu=round(cpu, 2),
        cells=changed(before, plan),
    )


def _unchanged(before: Plan | None, why: str, arrivals: int) -> Tuning:
    return Tuning(number=before.number if before is not None else None, adopted=False, why=why, arrivals=arrivals)


NICE = 10
"""Added to the niceness of the process that tunes again and again: requests come first."""

UNSIGNED: Mapping[str, str] = {"TAXIWAY_SECRET": "0" * 64}
"""A tuner signs nothing, so it needs no signing key."""

logger = logging.getLogger(__name__)


@click.command()
@click.option("--once", is_flag=True, help="Tune once, show what was found, and exit.")
@click.option("--dry-run", is_flag=True, help="Do not write the plan.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per tuning.")
@click.option(
    "--prior",
    metavar="HISTORY|MIX",
    help="What to plan for until requests arrive: a CSV file, a UTC day, or requests a second as "
    "MODEL[/SERVICE]=RATE,…; by default all models and services alike.",
)
def tune(*, once: bool, dry_run: bool, as_json: bool, prior: str | None) -> None:
    """Keep the fleet's plan: which class each model and service prefers, and how classes scale."""
    log_to_stderr()
    try:
        settings = settings_from({**UNSIGNED, **os.environ})
        topology = load_topology(settings.queues)
        tuner = FleetTuner(settings, topology, parse_prior(prior, settings.broker) if prior else {})
        if once:
            _tune(tuner, dry_run=dry_run, as_json=as_json, show=True)
            return
    except (SettingsError, TopologyError, TraceError, CommandError) as error:
        report(str(error), "")
        sys.exit(USAGE)
    os.nice(NICE)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        click.echo(msgspec.json.encode({"ready": "tuner"}))
        if not topology.plan.enabled:
            logger.info("not tuning: plan.enabled is false in queues.yaml")
            signal.pause()
        while True:
            # a turn that hangs ends the process, with all tracebacks: what started it starts another
            faulthandler.dump_traceback_later(HUNG, exit=True, file=sys.__stderr__ or 2)
            time.sleep(_turn(tuner, dry_run=dry_run, as_json=as_json))
    finally:
        with suppress(BrokerUnavailableError):  # the lease ends by itself
            tuner.close()


def _stop(*_: object) -> NoReturn:
    """End at once, also during a search: only a whole plan is ever written."""
    raise SystemExit(0)


def _turn(tuner: FleetTuner, *, dry_run: bool, as_json: bool) -> float:
    """Tune if that is due and no other tuner does; the seconds to pause after it."""
    try:
        if not tuner.lead():
            return WAIT
        if tuner.due():
            _tune(tuner, dry_run=dry_run, as_json=as_json, show=False)
    except BrokerUnavailableError as error:
        logger.warning("not tuned", extra={"error": error.message})
    except TraceError as error:
        logger.error("not tuned", extra={"error": str(error)})
    except StuckError as error:
        logger.error("not tuned: the fleet's twin is stuck", extra={"error": str(error)})
    return tuner.rest


def _tune(tuner: FleetTuner, *, dry_run: bool, as_json: bool, show: bool) -> None:
    tuning, plan = tuner.tune(dry_run=dry_run)
    logger.info("tuned", extra=msgspec.to_builtins(tuning))
    if as_json:
        click.echo(msgspec.json.encode({**msgspec.to_builtins(tuning), "plan": msgspec.to_builtins(plan)}))
    elif show:
        stdout_console().print(*_tables(tuning, plan), sep="\n")


def _tables(tuning: Tuning, plan: Plan | None) -> list[Table | str]:
    """The tuning in words, and the plan's cells and classes."""
    scores = "" if tuning.after is None else f"; {tuning.after:g} USD/h predicted"
    before = "" if tuning.before is None else f" ({tuning.before:g} before)"
    said = f"plan {tuning.number}: {'adopted' if tuning.adopted else 'unchanged'}, {tuning.why}{scores}{before}"
    return [said, *(plan_tables(plan) if plan is not None else ())]


if __name__ == "__main__":
    tune()
