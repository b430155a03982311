"""A fleet and a machine as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from local.demo import Answer, Summary, contrasts, summaries
from local.doctor import Finding
from local.state import Fleet
from tasks.machine import Machine

SCREEN = 100
"""Columns that the demo's answers fit, also where they go to a file."""

_WIDE = 220
_INPUT = 60  # characters of an example's input
_ANSWER = 40  # and of its answer
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


def show_answers(answers: Sequence[Answer], machine: Machine, console: Console) -> None:
    """The demo in short: a line a class and model, some answers with their reasons, and what emulation means here."""
    results = [answer for answer in answers if answer.result is not None]
    console.print(_summary(summaries(answers)))
    for answer in contrasts(results):
        console.print()
        for text, style in zip(_example(answer), ("bold", "", "dim"), strict=True):
            console.print(Padding(Text(text, style, overflow="fold"), (0, 0, 0, 0 if style == "bold" else 2)))
    console.print()
    _show_totals(answers, console)
    emulated = Counter(a.result.report.hardware_class for a in results if a.result and a.result.report.emulated)
    if emulated:
        console.print(_emulation(emulated), highlight=False)
    if "torch" not in machine.runtimes:
        console.print("torch is not installed, so none of its variants took part: `make torch` adds it.")


def console_of(width: int) -> Console:
    """The terminal, as wide as it is; where stdout is none, a file of so many columns."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=width)


def show_rows(answers: Sequence[Answer]) -> None:
    """Every input of the demo: what came, where it ran and why, and what it took; wide where it is no terminal."""
    console = console_of(_WIDE)
    table = Table("input", "answer", "class", "variant", "device", *_FIGURES, "reason", padding=(0, 1))
    for column, width in zip(table.columns, (30, 34), strict=False):
        column.max_width = width
        column.no_wrap = True
    for column in table.columns[5:-1]:
        column.justify = "right"
    for answer in answers:
        table.add_row(*map(escape, _row(answer)))
    console.print(table)


def _summary(rows: Sequence[Summary]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("class", "model", "variant"):
        table.add_column(name, no_wrap=True)
    for name in ("answers", "waited", "ran", "in all", "USD per 1,000"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        name = f"{row.hardware_class} (emulated)" if row.emulated else row.hardware_class
        times = (_span(seconds) for seconds in (row.waited, row.ran, row.elapsed))
        table.add_row(name, row.model, row.variant, str(row.answers), *times, f"{row.cost * 1000:.2g}")
    return table


def _example(answer: Answer) -> tuple[str, str, str]:
    """An input with its terms, where and how fast it was answered, and why there; three lines."""
    assert answer.result is not None
    report, terms = answer.result.report, dict(answer.ask.terms)
    asked = [str(terms.pop("service"))]
    asked += [f"{name} {f'{value:g} s' if name == 'deadline' else value}" for name, value in terms.items()]
    where = f"{report.hardware_class}/{report.variant}" + (" (emulated)" if report.emulated else "")
    shown = shorten(_shown(answer.result.outputs), _ANSWER)
    return (
        f"{answer.ask.model} ({', '.join(asked)}): {shorten(answer.ask.shown, _INPUT)}",
        f"→ {shown}   {where}, {_span(answer.elapsed)}",
        f"because: {report.reason}",
    )


def _emulation(emulated: Mapping[str, int]) -> str:
    """What the answers of emulated classes say, and what they do not."""
    classes = " and ".join(sorted(emulated))
    return (
        f"{sum(emulated.values())} of them, on {classes}, are emulated: this machine has no such device, so its CPU "
        "answered, at its own speed and under the class's price. They show where requests go and why, not how fast the "
        "device is."
    )


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


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


def shorten(text: str, most: int) -> str:
    """The text in one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


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
