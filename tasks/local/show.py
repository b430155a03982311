"""A fleet and a machine as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from tasks.local.demo import Answer
from tasks.local.doctor import Finding
from tasks.local.machine import Machine
from tasks.local.state import Fleet

_WIDE = 220
_FIGURES = ("wait ms", "run ms", "total ms", "USD")


def show_fleet(fleet: Fleet, console: Console) -> None:
    """Where a fleet's doors are, and what its workers run on."""
    doors = {"HTTP": fleet.http, "Flower": fleet.flower or "not started", "broker": fleet.broker, "data": fleet.data}
    for name, address in doors.items():
        console.print(f"{name:7} {address}", soft_wrap=True, highlight=False)
    workers = Table("class", "device", "worker", "pid")
    for worker in fleet.workers:
        device = f"{worker.device} (emulated)" if worker.emulated else worker.device
        workers.add_row(worker.hardware_class, device, worker.worker, str(worker.pid))
    for name, why in sorted(fleet.left_out.items()):
        workers.add_row(name, "–", f"not started: {why} (--emulate {name} serves it on the CPU)", "–")
    console.print(workers)


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """What the machine has, and how to get what it lacks."""
    table = Table("", "what", "found", Column("what to do", overflow="fold"))
    for finding in findings:
        mark = "[green]✓[/]" if finding.found else "[yellow]–[/]"
        table.add_row(mark, finding.subject, finding.value, finding.remedy)
    console.print(table)


def wide_console() -> Console:
    """stdout, wide enough for the demo's table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


def show_answers(answers: Sequence[Answer], machine: Machine, console: Console) -> None:
    """The demo's table: what was asked, what came, where it ran and why, and what it took."""
    table = Table("input", "answer", "class", "variant", "device", *_FIGURES, "reason", padding=(0, 1))
    for column, width in zip(table.columns, (30, 34), strict=False):
        column.max_width = width
        column.no_wrap = True
    for column in table.columns[5:-1]:
        column.justify = "right"
    for answer in answers:
        table.add_row(*map(escape, _row(answer)))
    console.print(table)
    _show_totals(answers, console)
    if "torch" not in machine.runtimes:
        console.print("torch is not installed, so none of its variants took part: `make torch` adds it.")


def _row(answer: Answer) -> list[str]:
    service = str(answer.ask.terms["service"])
    asked = f"{answer.ask.model} ({service}): {answer.ask.shown}"
    elapsed = f"{answer.elapsed * 1000:.0f}"
    if answer.result is None:
        return [asked, "–", "–", "–", "–", "–", "–", elapsed, "–", answer.error]
    report = answer.result.report
    device = f"{report.device} (emulated)" if report.emulated else report.device
    times = [f"{report.queue_wait * 1000:.0f}", f"{report.run_time * 1000:.0f}", elapsed, f"{report.cost:.2e}"]
    shown = _shown(answer.result.outputs)
    return [asked, shown, report.hardware_class, report.variant, device, *times, report.reason]


def _shown(outputs: Mapping[str, Any]) -> str:
    """An answer in one line: a label with its score, a text, the first numbers of a vector."""
    if "label" in outputs:
        return f"{outputs['label']} {float(outputs['score']):.2f}"
    first = next(iter(outputs.values()))
    if hasattr(first, "tolist"):
        first = first.tolist()
    if isinstance(first, list):
        return f"[{', '.join(f'{number:.3f}' for number in first[:3])}, …] {len(first)} numbers"
    return str(first).replace("\n", " ")


def _show_totals(answers: Sequence[Answer], console: Console) -> None:
    results = [answer.result for answer in answers if answer.result is not None]
    classes = Counter(result.report.hardware_class for result in results)
    where = ", ".join(f"{count} on {name}" for name, count in sorted(classes.items()))
    cost = sum(result.report.cost for result in results)
    console.print(f"{len(results)} of {len(answers)} inputs answered for {cost:.2e} USD: {where}", highlight=False)
    for answer in answers:
        if answer.result is None:
            console.print(escape(f"failed: {answer.ask.model}: {answer.ask.shown}: {answer.error}"), style="red")
