"""Output for people. Only this module imports rich, and it is imported only for such output."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from taxiway.cli import span
from taxiway.cli.address import AskedFleet, fleet_options, print_json
from taxiway.client.arrays import ArrayProgress, Watch
from taxiway.contract.job import FINAL, JobRecord, JobStatus, Result, RunProgress, RunReport, Tokens
from taxiway.contract.stream import Event
from taxiway.errors import FleetUnavailable

_NUMBERS_SHOWN = 8
"""Maximum numbers shown of a list."""

_MOVES_SHOWN = 5
_UNBOUNDED = 10_000  # columns of what is no terminal

UNBROKEN = 24
"""Characters up to which the cells of a table's column stay on one line, however long the last column's text is."""


def show_result(result: Result) -> None:
    """The outputs, then one dim line with where and how the job ran."""
    console = stdout_console()
    if _are_rows(result.outputs):
        _show_rows(console, result.outputs)
    else:
        width = max(map(len, result.outputs), default=0)
        for name, value in result.outputs.items():
            console.print(Text.assemble((f"{name:<{width}}  ", "bold"), brief(value)), soft_wrap=True)
    console.print(Text(f"{result.model}  {report_line(result.report)}", "dim"), soft_wrap=True)


def report_line(report: RunReport) -> str:
    """Where a job ran, how long it took and why it was placed there, in one line."""
    device, load = f"{report.device} (emulated)" if report.emulated else report.device, report.load_time
    parts = [
        report.hardware_class,
        report.variant,
        device,
        f"waited {duration(report.queue_wait)}" + (f" ({duration(load)} for the load)" if load else ""),
        f"ran {duration(report.run_time)} in a batch of {report.batch}",
        *([] if report.tokens is None else [_tokens(report.tokens)]),
        *([f"{duration(report.redone)} redone"] if report.redone else []),
        *([report.checkpoints] if report.checkpoints else []),
        f"${report.cost:.3g}",
        report.reason,
    ]
    return " · ".join(parts)


def _tokens(tokens: Tokens) -> str:
    cached = f" ({tokens.cached} cached)" if tokens.cached else ""
    return f"{tokens.input} tokens in{cached}, {tokens.output} out"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one; 0 for what is left of a sum of fractions."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{round(seconds, 6) * 1000:.3g} ms"


def brief(value: Any) -> str:
    """A value in one line; long lists and bytes are truncated, with their length."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, list):
        shown = ", ".join(brief(below) for below in value[:_NUMBERS_SHOWN])
        return f"[{shown}]" if len(value) <= _NUMBERS_SHOWN else f"[{shown}, … {len(value)} in all]"
    if isinstance(value, dict):
        return ", ".join(f"{name} {brief(below)}" for name, below in value.items())
    return str(value)


def show_status(status: JobStatus) -> None:
    """A job in a panel; unknown fields are omitted."""
    facts = {
        "state": str(status.state),
        "model": status.model,
        "class": status.hardware_class,
        "variant": status.variant,
        "device": status.device,
        "progress": "" if status.progress is None or status.state in FINAL else status.progress.text,
        "position": "" if status.position is None else str(status.position),
        "expected": "" if status.eta is None else f"in {duration(status.eta)}",
        "tenant": status.tenant,
        "attempts": str(status.attempts or ""),
        "accepted": _moment(status.accepted),
        "waited": duration(status.started - status.accepted) if status.started else "",
        "took": duration(status.finished - status.accepted) if status.finished and status.accepted else "",
        "deadline": _moment(status.deadline_at),
        "reason": status.reason,
        "error": "" if status.error is None else f"{status.error.code}: {status.error.message}",
    }
    stdout_console().print(Panel(_facts(facts), title=f"job {status.id}", title_align="left", expand=False))


def show_placement(placement: Mapping[str, Any]) -> None:
    """The reason, every candidate with its figures, and the classes that could not run the request."""
    console = stdout_console()
    tables = ("considered", "refused", "moves", "parts")
    console.print(
        _facts({name: brief(v) for name, v in placement.items() if name not in tables and v not in (None, False)})
    )
    if placement.get("considered"):
        console.print(_table("considered, cheapest first", [_considered_row(row) for row in placement["considered"]]))
    if refused := placement.get("refused"):
        rows = [{"class": one["hardware_class"], "variant": one["variant"], "why": one["reason"]} for one in refused]
        console.print(_table("refused", rows))
    if placement.get("moves"):
        console.print(_table("moved since", [_move_row(row) for row in placement["moves"]]))
    if placement.get("parts"):
        console.print(_table("runs that were cut", [_part_row(row) for row in placement["parts"]]))
    for line in _notes(placement.get("considered", ())):
        console.print(line, soft_wrap=True)


def _notes(considered: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    """What the figures rest on, each once with the candidates that it is about, and what helps without a profile."""
    about: dict[str, list[str]] = {}
    for row in considered:
        if row["warning"]:
            about.setdefault(row["warning"], []).append(f"{row['hardware_class']}/{row['variant']}")
    for warning, named in about.items():
        word, style = ("warning", "yellow") if "profile" in warning else ("note", "dim")
        yield Text(f"{word}: {', '.join(named)}: {warning}", style)
    if any("profile" in warning for warning in about):
        yield Text("hint: `taxiway profile --model NAME` measures a machine, while nothing else runs on it", "dim")


def show_models(models: Sequence[Mapping[str, Any]]) -> None:
    """A table of models."""
    console = stdout_console()
    table = Table("model", "versions", "aliases", "variants", "what it does", box=None, pad_edge=False)
    for model in models:
        names = (_joined(model.get(field)) for field in ("versions", "aliases", "variants"))
        summary = Text("disabled", "red") if "disabled" in model else Text(_summary(model))
        table.add_row(Text(str(model["name"]), "bold"), *map(Text, names), summary)
    console.print(table)
    for model in models:
        if "disabled" in model:
            text = Text.assemble((f"{model['name']} is disabled: ", "red"), model["disabled"])
            console.print(text, soft_wrap=True)
        for name, why in model.get("problems", {}).items():
            console.print(Text(f"warning: {model['name']}: {name}: {why}", "yellow"), soft_wrap=True)


def _summary(model: Mapping[str, Any]) -> str:
    return f"another name of {model['alias_of']}" if "alias_of" in model else str(model.get("summary", ""))


def show_jobs(jobs: Sequence[JobRecord]) -> None:
    """A table of jobs with their age since acceptance, and their tenants if there are several."""
    now, tenants = time.time(), len({job.tenant for job in jobs}) > 1
    rows = [
        {
            "job": job.id,
            "state": str(job.state),
            "model": job.model,
            "class": job.hardware_class,
            "age": span(max(now - job.accepted, 0.001)),
            **({"tenant": job.tenant} if tenants else {}),
        }
        for job in jobs
    ]
    _print_rows("the latest first", rows, none="no such jobs")


def show_letters(found: Sequence[Mapping[str, Any]]) -> None:
    """A table of dead letters."""
    _print_rows("dead letters, most recent first", [_letter_row(one) for one in found], none="no dead letters")


def show_letter(found: Mapping[str, Any]) -> None:
    """A dead letter, the workers that its job crashed, and its message."""
    console = stdout_console()
    facts = {"job": found["job"], "given up": _moment(found["at"]), "by": found["by"], "why": found["reason"]}
    title = f"dead letter {found['id']}"
    console.print(Panel(_facts(facts | {"flaw": found["flaw"]}), title=title, title_align="left", expand=False))
    if found["history"]:
        console.print(_table("held it and ended", [_holder_row(holder) for holder in found["history"]]))
    for name, value in found["headers"].items():
        console.print(Text.assemble((f"{name}: ", "dim"), str(value)), soft_wrap=True)
    console.print(Text(found["body"]), soft_wrap=True)


def show_fleet(fleet: Mapping[str, Any]) -> None:
    """The fleet, as `top` shows it live."""
    stdout_console().print(fleet_view(fleet))


def fleet_view(fleet: Mapping[str, Any], trouble: str = "") -> Group:
    """What needs attention, then classes, the plan, the latest moves, other sites and devices.

    `trouble` says why the figures are stale.
    """
    parts: list[Any] = [_totals(fleet)]
    if trouble:
        parts.append(Text(f"stale: {trouble}", "yellow"))
    parts += [headline(fleet["problems"]), *map(_problem, fleet["problems"])]
    parts.append(_table("classes", [_class_row(name, facts) for name, facts in fleet["classes"].items()]))
    if plan := fleet.get("plan"):
        rows = planned_rows(plan)  # below their title, which a narrow table would wrap
        parts += [Text(plan_title(plan), "bold"), *([_table("", rows)] if rows else []), tuner_line(plan)]
    if fleet["moves"]:
        parts.append(_table("moves", [_latest_move(move, fleet["now"]) for move in fleet["moves"][:_MOVES_SHOWN]]))
    if sites := [row for facts in fleet["devices"] for row in site_rows(facts)]:
        parts.append(_table("sites", sites))
    return Group(*parts, _table("devices", [_device_row(facts) for facts in fleet["devices"]]))


def _totals(fleet: Mapping[str, Any]) -> Text:
    classes = fleet["classes"].values()
    counts = {
        "devices": len(fleet["devices"]),
        "waiting": sum(sum(one["depth"]) for one in classes),
        "held": fleet["held"],
        "dead letters": fleet["dead"],
    }
    parts = [f"{count} {what}" for what, count in counts.items() if count or what in ("devices", "waiting")]
    return Text("  ".join([*parts, f"${sum(one['spending'] for one in classes):.2f}/h"]), "bold")


def headline(problems: Sequence[Mapping[str, Any]]) -> Text:
    """How many things need attention, and which."""
    if not problems:
        return Text("all is well", "green")
    count = "1 thing needs attention" if len(problems) == 1 else f"{len(problems)} things need attention"
    subjects = list(dict.fromkeys(one["subject"] for one in problems))
    return Text(f"{count}: {', '.join(subjects)}", "bold red")


def _problem(one: Mapping[str, Any]) -> Text:
    return Text.assemble(("  ! ", "red"), (one["subject"], "bold"), f": {one['text']}", (f" → {one['remedy']}", "dim"))


def plan_title(plan: Mapping[str, Any]) -> str:
    """The plan's number and age, and who follows it."""
    if plan["number"] is None:
        return "no plan: each request is placed by itself"
    followers, routers = plan["followers"], plan["routers"]
    return f"plan {plan['number']}, {span(plan['age'])} old, followed by {followers} of {routers} routers"


def planned_rows(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per model and locality, a column per service; an arrow leads to a class that does not serve yet."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in plan["cells"]:
        key = cell["model"], cell["locality"] or ""
        before = cell["until_then"]
        row = rows.setdefault(key, {"model": " ".join(filter(None, key))})
        row[cell["service"]] = cell["prefers"] if before is None else f"{before or 'any'} → {cell['prefers']}"
    return list(rows.values())


def tuner_line(plan: Mapping[str, Any]) -> Text:
    """The tuner at work and what the last tuning found, or that there is none; in yellow what needs a look."""
    parts = [f"tuner {plan['tuner']}" if plan["tuner"] else "no tuner at work"]
    if plan["tuned"] is not None:
        parts.append(f"{span(plan['tuned'])} ago: {'adopted' if plan['adopted'] else 'unchanged'}, {plan['found']}")
    said = "; ".join(filter(None, [plan["not_followed"], ", ".join(parts)]))
    return Text(said, "yellow" if plan["not_followed"] or not plan["tuner"] else "dim")


def show_processes(processes: Sequence[Mapping[str, Any]]) -> None:
    """A table of the processes of a fleet on this machine, on stderr."""
    Console(stderr=True, highlight=False).print(_table("processes", [_process_row(process) for process in processes]))


def _process_row(process: Mapping[str, Any]) -> dict[str, Any]:
    last = process.get("last_exit")
    state = "ready" if process["ready"] else "starting" if process["pid"] else "waits to be restarted"
    at = "" if last is None else datetime.fromtimestamp(last["at"]).strftime("%H:%M:%S")
    return {
        "process": process["name"],
        "state": state,
        "restarts": process["restarts"],
        "last exit": "" if last is None else f"{at} {last['why']}",
        "last line of its log": "" if last is None else last["last_line"],
    }


def _considered_row(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = ("transfer", "wait", "load", "run")
    return {
        "class": row["hardware_class"],
        "variant": row["variant"],
        "finish": duration(row["finish"]),
        "=": " + ".join(f"{part} {duration(row[part])}" for part in parts if row[part] > 0),
        "at most": duration(row["at_most"]),
        "cost": f"${row['cost']:.3g}",
        "why not": "chosen" if row["chosen"] else row["why_not"],
    }


def _move_row(row: Mapping[str, Any]) -> dict[str, Any]:
    at = datetime.fromtimestamp(row["at"]).strftime("%H:%M:%S")
    return {"at": at, "from": row["source"], "to": row["target"], "why": row["reason"]}


def _latest_move(row: Mapping[str, Any], now: float) -> dict[str, Any]:
    ago = {"ago": span(now - row["at"]), "jobs": row["jobs"]}
    return {**ago, "from": row["source"], "to": row["target"], "why": row["reason"]}


def _part_row(row: Mapping[str, Any]) -> dict[str, Any]:
    where = {"class": row["hardware_class"], "device": row["device"], "took": duration(row.get("seconds", 0.0))}
    return {**where, "added": row.get("text", 0), "began": row.get("seam", ""), "ended": row.get("ended", "")}


def _letter_row(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dead letter": found["id"],
        "given up": _moment(found["at"]),
        "job": found["job"],
        "ended": len(found["history"]),
        "why": found["reason"],
    }


def _holder_row(holder: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "worker": holder["worker"],
        "since": _moment(holder["since"]),
        "while": "it ran" if holder["ran"] else "it waited there, or had just begun",
    }


USE = {"usd_per_million_input": "M in", "usd_per_million_output": "M out", "usd_per_request": "request"}
"""The prices of an endpoint's use, and what each is for: a million tokens of input or of output, or a request."""

TELLING_JOBS = 20
"""Fewest jobs whose share that kept within "at most" is shown."""


def _class_row(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    price, bounds, wanted = facts["price"], facts["bounds"], facts["replicas"]
    use = ", ".join(f"{price[field]:g}/{unit}" for field, unit in USE.items() if price.get(field))
    devices = str(facts["devices"]) if wanted in (None, facts["devices"]) else f"{facts['devices']}→{wanted}"
    return {
        "class": name,
        "used": f"{facts['utilisation']:.0%}" if facts["devices"] else "–",
        "waiting": sum(facts["depth"]),
        "oldest": span(facts["oldest"]),
        "work": span(sum(facts["work"])),
        "held": span(sum(facts["held"])),
        "devices": devices,
        "$/hour": f"{facts['spending']:.4g}",
        **({"$ of use": use} if use else {}),
        **({"at most": f"{bounds['held']:.0%} held"} if bounds and bounds["jobs"] >= TELLING_JOBS else {}),
    }


def _state(facts: Mapping[str, Any]) -> str:
    """Why a device takes no work of its class alone, to follow its name; empty if it does."""
    if facts.get("draining"):
        return " (draining)"
    if facts.get("serves") is not None:  # lent to another class, or taken out of its own
        return f" (serves {', '.join(facts['serves']) or 'no class'})"
    return f" (out of service: {facts['fault']})" if facts.get("fault") else ""


def site_rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for the other fleet that a device is; none of any other device."""
    peer = (facts.get("endpoint") or {}).get("peer")
    if peer is None:
        return []
    models = sorted({key.partition(":")[0] for key in peer.get("offers", ())})
    silent = facts.get("fault", "").removeprefix(f"site {peer['site']}: ")
    return [
        {
            "site": peer["site"] or "not reached yet",
            "class": facts["hardware_class"],
            "line": f"silent: {silent}" if silent else _line(peer),
            "offers": ", ".join(models) if models else "nothing",
            "old": duration(peer.get("age", 0.0)) if models else "",
            "dropped": peer.get("dropped", 0),
            "spent": f"${_spent(facts):.3g}",
        }
    ]


def _spent(facts: Mapping[str, Any]) -> float:
    """US dollars that a site has billed since its worker started here."""
    done = facts.get("done", {}).get(facts["hardware_class"], {})
    return float(sum(usd for by_tenant in done.get("dollars", {}).values() for usd in by_tenant.values()))


def _line(peer: Mapping[str, Any]) -> str:
    """How far a site is, and what the line to it carries, as far as that is known."""
    carries = peer.get("bytes_per_second")
    return f"{1000 * peer.get('round_trip', 0.0):.0f} ms" + (f", {carries / 1e6:.3g} MB/s" if carries else "")


def _device_row(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "worker": f"{facts['worker']}{_state(facts)}",
        "device": f"{facts['device']} (emulated)" if facts["emulated"] else facts["device"],
        **({"$/hour": facts["usd_per_hour"]} if facts.get("usd_per_hour") is not None else {}),
        "running": facts.get("running", 0),
        "held": facts.get("held", 0),
        "used": f"{facts.get('utilisation', 0):.0%}",
        "warm": ", ".join(facts.get("warm", [])),
    }


def _are_rows(outputs: Mapping[str, Any]) -> bool:
    """Whether every output is a list with the same number of rows. A list of numbers is taken for one row's vector."""
    columns = list(outputs.values())
    alike = all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
    return alike and any(not isinstance(value, int | float) for column in columns for value in column)


def _show_rows(console: Console, outputs: Mapping[str, list[Any]]) -> None:
    table = Table("row", *outputs, box=None, pad_edge=False)
    for number, row in enumerate(zip(*outputs.values(), strict=True)):
        table.add_row(str(number), *(Text(brief(value)) for value in row))
    console.print(table)


def _print_rows(title: str, rows: Sequence[Mapping[str, Any]], *, none: str) -> None:
    """Print a table, or what it means that there are no rows."""
    stdout_console().print(_table(title, rows) if rows else Text(none, "dim"))


_ID = re.compile(r"(\w+_)?[0-9a-f-]{12,}")
"""An id: people copy it, so it is never broken over lines."""

_GAP = 2  # columns between two columns of a table


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    cells = {name: [brief(row.get(name, "")) for row in rows] for name in names}
    widths = {name: max(map(len, (name, *cells[name]))) for name in names}
    ids = {name for name in names if any(map(_ID.fullmatch, cells[name]))}
    unbroken = ids | {name for name in names[:-1] if widths[name] <= UNBROKEN}
    if sum(widths[name] for name in unbroken) + _GAP * len(names) > stdout_console().width:
        unbroken = ids  # the others share what is left
    for name in names:
        least = widths[name] if name in ids else None
        table.add_column(name, no_wrap=name in unbroken, min_width=least, overflow="fold")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def _facts(facts: Mapping[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        if text:
            grid.add_row(Text(name, "dim"), Text(text))
    return grid


def _joined(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}→{below}" if isinstance(below, int | str) else key for key, below in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "milliseconds") if seconds else ""


def stdout_console() -> Console:
    """stdout; without a terminal, lines are neither wrapped nor cut, unless COLUMNS bounds them."""
    return Console(file=sys.stdout, width=shutil.get_terminal_size((_UNBOUNDED, 24)).columns, highlight=False)


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Callable[[Event], None]]:
    """A bar with what a callable reports: the share that is done, the time left, its message. It is gone at the end."""
    texts = [TextColumn("{task.fields[left]}"), TextColumn("{task.description}", markup=False)]
    console = console or Console(stderr=True)
    with Progress(BarColumn(), TaskProgressColumn(), *texts, console=console, transient=True) as bars:
        bar = bars.add_task("", total=1.0, visible=False, left="")

        def show(event: Event) -> None:
            if isinstance(event, RunProgress):
                left = "" if event.left is None else f"{duration(event.left)} left"
                bars.update(bar, completed=event.fraction, visible=True, description=event.message, left=left)

        yield show


@contextmanager
def array_bar() -> Iterator[Watch]:
    """A bar on stderr with an array's members that have ended, and the time left, on a terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    above = sys.stdout.isatty()  # answers are printed above the bar
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=above) as bars:
        bar = bars.add_task("", total=None)

        def watch(progress: ArrayProgress) -> None:
            failed = f", {progress.failed} failed" if progress.failed else ""
            bars.update(bar, completed=progress.done, total=progress.members or None, description=f"members{failed}")

        yield watch


@click.command()
@click.option("--every", type=click.FloatRange(0.2), default=1.0, show_default=True, help="Seconds between updates.")
@fleet_options
def top(*, every: float, fleet: AskedFleet) -> None:
    """Show what `taxiway status` shows of the fleet, live. Ctrl-C exits."""

    def look() -> Mapping[str, Any]:
        return fleet.ask(lambda client: client.fleet())

    now = look()
    if fleet.as_json:
        print_json(now)
        return
    first = fleet_view(now)
    with Live(first, console=stdout_console(), screen=True, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(every)
            trouble = ""
            try:
                now = look()
            except FleetUnavailable as error:  # the last overview, with the reason
                trouble = error.message
            live.update(fleet_view(now, trouble), refresh=True)
