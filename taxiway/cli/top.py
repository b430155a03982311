"""`top`: a live overview of the fleet, redrawn until it is stopped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from taxiway.cli.address import AskedFleet, fleet_options, print_json
from taxiway.cli.show import headline, plan_title, planned_rows, site_rows, span, stdout_console, tuner_line
from taxiway.errors import FleetUnavailable

_BAR = 5
_HEADINGS = 5  # lines other than classes, devices and moves: headline, warning, two headings, omitted devices
_MOVES_SHOWN = 5
_MODELS_SHOWN = 8


@click.command()
@click.option("--every", type=click.FloatRange(0.2), default=1.0, show_default=True, help="Seconds between updates.")
@click.option("--once", is_flag=True, help="Look once and leave.")
@fleet_options
def top(*, every: float, once: bool, fleet: AskedFleet) -> None:
    """Show classes, queues, devices, moves and spending, live. Ctrl-C exits."""

    def look() -> Mapping[str, Any]:
        return fleet.ask(lambda client: client.fleet())

    if fleet.as_json:
        print_json(look())
        return
    console, now = stdout_console(), look()
    if once:
        whole = page(now, rows=len(now["devices"]))
        for part in whole.renderables:
            if isinstance(part, Table):
                part.expand = part.expand and console.is_terminal
        console.print(whole)
        return
    first = page(now, rows=_room(console, now))
    with Live(first, console=console, screen=True, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(every)
            before, trouble = now, ""
            try:
                now = look()
            except FleetUnavailable as error:  # the last overview, with the reason
                trouble = error.message
            live.update(page(now, before, rows=_room(console, now), trouble=trouble), refresh=True)


def page(fleet: Mapping[str, Any], before: Mapping[str, Any] | None = None, *, rows: int, trouble: str = "") -> Group:
    """The whole page, for a terminal of 80 columns or more.

    `before` is an earlier overview, from which rates are computed. At most `rows` devices are shown; `trouble` says why
    the figures are stale.
    """
    parts: list[Any] = [_headline(fleet), _classes(fleet, _rates(before, fleet))]
    if trouble or fleet["stale"]:
        parts.insert(1, Text(f"stale: {trouble or 'the state store does not answer'}", "yellow"))
    else:
        parts.insert(1, _line(headline(fleet.get("problems", ()))))
    if fleet.get("plan"):
        parts += _plan(fleet["plan"])
    if fleet["moves"]:
        parts.append(_moves(fleet["moves"][:_MOVES_SHOWN], fleet["now"]))
    devices = fleet["devices"]
    if sites := _site_rows(fleet):
        table = _table("site", "class", "offers", ">old", "line")
        for row in sites:
            table.add_row(*(str(row[name]) for name in ("site", "class", "offers", "old", "line")))
        parts.append(table)
    parts.append(_devices(devices[:rows]))
    if len(devices) > rows:
        parts.append(Text(f"… and {len(devices) - rows} more", "dim"))
    return Group(*parts)


def _room(console: Console, fleet: Mapping[str, Any]) -> int:
    """How many devices fit beside the rest of the page."""
    moves = min(len(fleet["moves"]), _MOVES_SHOWN)
    planned = min(len(planned_rows(fleet["plan"])), _MODELS_SHOWN) + 3 if fleet.get("plan") else 0
    sites = len(_site_rows(fleet))
    others = sum(count + 1 for count in (moves, sites) if count)
    return max(1, console.height - len(fleet["classes"]) - others - planned - _HEADINGS)


def _headline(fleet: Mapping[str, Any]) -> Text:
    classes = fleet["classes"].values()
    spending = sum(one["spending"] for one in classes)
    counts = {
        "devices": len(fleet["devices"]),
        "waiting": sum(sum(one["depth"]) for one in classes),
        "held": fleet["held"],
        "dead letters": fleet["dead"],
    }
    parts = [f"{count} {what}" for what, count in counts.items() if count or what in ("devices", "waiting")]
    return Text("  ".join(["taxiway", *parts, f"${spending:.2f}/h"]), "bold")


def _rates(before: Mapping[str, Any] | None, fleet: Mapping[str, Any]) -> Mapping[str, float]:
    """Jobs finished per second by class since the earlier overview, for the workers in both."""
    if before is None or fleet["now"] <= before["now"]:
        return {}
    past = {device["worker"]: device.get("done", {}) for device in before["devices"]}
    rates: dict[str, float] = {}
    for device in fleet["devices"]:
        for name, done in device.get("done", {}).items() if device["worker"] in past else ():
            gained = _jobs(done) - _jobs(past[device["worker"]].get(name, {}))
            rates[name] = rates.get(name, 0.0) + max(gained, 0) / (fleet["now"] - before["now"])
    return rates


def _jobs(done: Mapping[str, Any]) -> int:
    return sum(done.get("outcomes", {}).values())


def _classes(fleet: Mapping[str, Any], done: Mapping[str, float]) -> Table:
    columns = ("class", "busy", ">waiting", ">oldest", ">work", ">held", ">rows/s", ">done/s", ">devices", ">$/h")
    table = _table(*columns)
    for name, one in fleet["classes"].items():
        wanted = one["replicas"]
        devices = str(one["devices"]) if wanted in (None, one["devices"]) else f"{one['devices']}→{wanted}"
        table.add_row(
            name,
            _bar(one["utilisation"]) if one["devices"] else "–",
            str(sum(one["depth"])),
            span(one["oldest"]),
            span(sum(one["work"])),
            span(sum(one["held"])),
            _rate(one["rows_per_second"]),
            _rate(done.get(name, 0.0)),
            devices,
            f"{one['spending']:.2f}" if one["devices"] else "",
        )
    return table


def _busy(device: Mapping[str, Any]) -> Text:
    """How busy a device is, or that it takes no work."""
    if device.get("draining"):
        return Text("draining", "yellow")
    return Text("out", "red") if device.get("fault") else _bar(device.get("utilisation", 0.0))


def _devices(devices: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("device", "class", "busy", ">runs", ">has", "warm")
    hosts = {_host(one) for one in devices}
    for one in devices:
        emulated = " (emulated)" if one["emulated"] else ""
        host = f"@{_host(one)}" if len(hosts) > 1 else ""
        warm = sorted({key.partition(":")[0] for key in one.get("warm", ())})
        table.add_row(
            f"{one['device']}{host}{emulated}",
            ", ".join(one.get("serves") or [one["hardware_class"]]),
            _busy(one),
            str(one.get("running", 0) or ""),
            str(one.get("held", 0) or ""),
            ", ".join(warm),
        )
    return table


def _site_rows(fleet: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for facts in fleet["devices"] for row in site_rows(facts)]


def _moves(moves: Iterable[Mapping[str, Any]], now: float) -> Table:
    table = _table(">ago", ">jobs", "from → to", "why")
    for one in moves:
        table.add_row(span(now - one["at"]), str(one["jobs"]), f"{one['source']} → {one['target']}", one["reason"])
    return table


def _plan(plan: Mapping[str, Any]) -> list[Any]:
    """A line on the plan, the class that each model and service prefers, and a line on the tuner."""
    rows = planned_rows(plan)
    parts: list[Any] = [_line(Text(plan_title(plan)))]
    if rows:
        services = list(dict.fromkeys(cell["service"] for cell in plan["cells"]))
        table = _table("model", *services)
        for row in rows[:_MODELS_SHOWN]:
            table.add_row(row["model"], *(row.get(service, "").rpartition(" ")[2] for service in services))
        parts.append(table)
    return [*parts, _line(tuner_line(plan))]


def _line(text: Text) -> Text:
    """The text on one line, cut at the terminal's width."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _host(device: Mapping[str, Any]) -> str:
    """A worker's machine, by the first part of its name."""
    return str(device["worker"]).rpartition("@")[2].partition(".")[0]


def _table(*columns: str) -> Table:
    """A table without borders; a column whose heading begins with `>` is right-aligned.

    Where the terminal is too narrow, the last column is cut if it is a text.
    """
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for column in columns:
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=side, no_wrap=True, overflow="ellipsis")
    if not columns[-1].startswith(">"):
        table.expand, table.columns[-1].ratio = True, 1
    return table


def _bar(share: float) -> Text:
    full = round(min(max(share, 0.0), 1.0) * _BAR)
    colour = "red" if share > 0.9 else "yellow" if share > 0.65 else "green"
    return Text.assemble(("█" * full, colour), ("░" * (_BAR - full), "dim"), f" {share:4.0%}")


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}" if rate >= 0.05 else ""
