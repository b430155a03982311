"""`top`: the fleet at a glance, drawn anew until it is stopped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from taxiway.cli.address import ask, fleet_options, print_json
from taxiway.cli.show import duration

_BAR = 8
_MOVES_SHOWN = 5


@click.command()
@click.option("--every", type=click.FloatRange(0.2), default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look once and leave.")
@fleet_options
def top(*, every: float, once: bool, url: str | None, data: Path | None, as_json: bool) -> None:
    """Show classes, queues, devices, moves and spending, live; Ctrl-C leaves."""

    def look() -> Mapping[str, Any]:
        return ask(url, data, lambda client: client.fleet())

    if as_json:
        print_json(look())
        return
    console = Console()
    if once:
        console.print(page(look()))
        return
    with Live(page(look()), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                live.update(page(look()), refresh=True)
        except KeyboardInterrupt:
            pass


def page(fleet: Mapping[str, Any]) -> Group:
    """The whole picture, for a terminal of 80 columns or more."""
    parts: list[Any] = [_headline(fleet), _classes(fleet["classes"]), _devices(fleet["devices"])]
    if fleet["moves"]:
        parts.append(_moves(fleet["moves"][:_MOVES_SHOWN], fleet["now"]))
    return Group(*parts)


def _headline(fleet: Mapping[str, Any]) -> Text:
    classes = fleet["classes"].values()
    waiting = sum(sum(one["depth"]) for one in classes)
    spending = sum(one["spending"] for one in classes)
    line = f"taxiway  {len(fleet['devices'])} devices  {waiting} waiting  ${spending:.2f}/h"
    text = Text(line, "bold")
    if fleet["stale"]:
        text.append("  old: the state store does not answer", "yellow")
    return text


def _classes(classes: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("class", "busy", ">waiting", ">oldest", ">work", ">held", ">rows/s", ">devices", ">$/h")
    for name, one in classes.items():
        wanted = one["replicas"]
        devices = str(one["devices"]) if wanted in (None, one["devices"]) else f"{one['devices']}→{wanted}"
        table.add_row(
            name,
            _bar(one["utilisation"]) if one["devices"] else "–",
            str(sum(one["depth"])),
            _seconds(one["oldest"]),
            _seconds(sum(one["work"])),
            _seconds(sum(one["held"])),
            f"{one['rows_per_second']:.3g}" if one["rows_per_second"] >= 0.05 else "",
            devices,
            f"{one['spending']:.2f}" if one["devices"] else "",
        )
    return table


def _devices(devices: Iterable[Mapping[str, Any]]) -> Table:
    table = _table("device", "class", "busy", ">rows", ">held", "warm")
    for one in devices:
        emulated = " (emulated)" if one["emulated"] else ""
        warm = sorted({key.partition(":")[0] for key in one.get("warm", ())})
        table.add_row(
            f"{one['device']}{emulated}",
            one["hardware_class"],
            _bar(one.get("utilisation", 0.0)),
            str(one.get("running", 0) or ""),
            str(one.get("held", 0) or ""),
            ", ".join(warm),
        )
    return table


def _moves(moves: Iterable[Mapping[str, Any]], now: float) -> Table:
    table = _table(">ago", ">jobs", "from → to", "why")
    for one in moves:
        table.add_row(_seconds(now - one["at"]), str(one["jobs"]), f"{one['source']} → {one['target']}", one["reason"])
    return table


def _table(*columns: str) -> Table:
    """A table without a frame; a heading that begins with `>` stands to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=side, no_wrap=True, overflow="ellipsis")
    return table


def _bar(share: float) -> Text:
    full = round(min(max(share, 0.0), 1.0) * _BAR)
    colour = "red" if share > 0.9 else "yellow" if share > 0.65 else "green"
    return Text.assemble(("█" * full, colour), ("░" * (_BAR - full), "dim"), f" {share:4.0%}")


def _seconds(seconds: float) -> str:
    return duration(seconds) if seconds >= 0.0005 else ""
