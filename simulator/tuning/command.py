"""The command `tune`. Data to stdout, logs to stderr.

`python -m simulator.tuning.command` is the same without the simulator's other commands and what they import.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

import click
import msgspec
from rich.console import Console
from rich.table import Table

from router.decide.plan import Plan
from simulator.reports import plan_tables
from simulator.tuning.process import LEASE, FleetTuner, Tuning
from simulator.tuning.tuner import REST
from tasks.settings import SettingsError, settings_from
from tasks.telemetry import log_to_stderr
from tasks.topology import TopologyError, load_topology
from taxiway.errors import BrokerUnavailableError

NICE = 10
"""Added to the niceness of the process that tunes again and again: requests come first."""

UNSIGNED: Mapping[str, str] = {"TAXIWAY_SECRET": "0" * 64}
"""A tuner signs nothing, so it needs no signing key."""

logger = logging.getLogger(__name__)


@click.command()
@click.option("--once", is_flag=True, help="Tune once, show what was found, and exit.")
@click.option("--dry-run", is_flag=True, help="Do not write the plan.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per tuning.")
def tune(*, once: bool, dry_run: bool, as_json: bool) -> None:
    """Keep the fleet's plan: which class each model and service prefers, and how classes scale."""
    log_to_stderr()
    try:
        settings = settings_from({**UNSIGNED, **os.environ})
        topology = load_topology(settings.queues)
    except (SettingsError, TopologyError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    tuner = FleetTuner(settings, topology)
    if once:
        _tune(tuner, dry_run=dry_run, as_json=as_json, show=True)
        return
    os.nice(NICE)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        click.echo(msgspec.json.encode({"ready": "tuner"}))
        if not topology.plan.enabled:
            logger.info("not tuning: plan.enabled is false in queues.yaml")
            signal.pause()
        while True:
            time.sleep(_turn(tuner, topology.plan.period, dry_run=dry_run, as_json=as_json))
    finally:
        _leave(tuner)


def _stop(*_: object) -> NoReturn:
    """End at once, also during a search: only a whole plan is ever written."""
    raise SystemExit(0)


def _turn(tuner: FleetTuner, period: float, *, dry_run: bool, as_json: bool) -> float:
    """Tune if that is due and no other tuner does; the seconds to pause after it."""
    try:
        if not tuner.lead():
            return min(period, LEASE / 2)
        if tuner.due():
            _tune(tuner, dry_run=dry_run, as_json=as_json, show=False)
    except BrokerUnavailableError as error:
        logger.warning("not tuned", extra={"error": error.message})
    return REST


def _tune(tuner: FleetTuner, *, dry_run: bool, as_json: bool, show: bool) -> Tuning:
    tuning, plan = tuner.tune(dry_run=dry_run)
    logger.info("tuned", extra=msgspec.to_builtins(tuning))
    if as_json:
        click.echo(msgspec.json.encode({**msgspec.to_builtins(tuning), "plan": msgspec.to_builtins(plan)}))
    elif show:
        console = Console(width=shutil.get_terminal_size((160, 24)).columns)
        console.print(*_tables(tuning, plan), sep="\n")
    return tuning


def _tables(tuning: Tuning, plan: Plan | None) -> list[Table | str]:
    """The tuning in words, and the plan's cells and classes."""
    scores = "" if tuning.after is None else f"; {tuning.after:g} USD/h predicted"
    before = "" if tuning.before is None else f" ({tuning.before:g} before)"
    said = f"plan {tuning.number}: {'adopted' if tuning.adopted else 'unchanged'}, {tuning.why}{scores}{before}"
    if plan is None:
        return [said]
    return [said, *plan_tables(plan)]


def _leave(tuner: FleetTuner) -> None:
    try:
        tuner.close()
    except BrokerUnavailableError:
        logger.debug("the lease ends by itself")


if __name__ == "__main__":
    tune()
