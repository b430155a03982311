"""The demo: starts a fleet, runs real models on real inputs on three hardware classes, and stops it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from local.state import Fleet, stop_fleet
from local.supervisor import StartError, in_tree, own_command
from local.workload import Ask
from taxiway import AsyncClient, Result, RunReport
from taxiway.errors import OverloadedError, TaxiwayError

PATIENCE = 120.0
"""Seconds within which every answer must be there."""

DEMO_COUNTS = {"cpu.batch": 1}
"""Workers of the demo's fleet where it is not one a device: three classes share the cores of a laptop."""

EXAMPLES = 5
"""Answers that are shown with their reasons."""

_ATTEMPTS = 20
_RETRY_AFTER = 0.5  # seconds, where an overloaded fleet does not say itself


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One input and what came of it; `elapsed` is seconds from submission to answer as the caller saw it.

    `error` is empty where there is a result.
    """

    ask: Ask
    elapsed: float
    result: Result | None = None
    error: str = ""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The answers of one model by one variant on one class: medians of seconds, and the mean cost in US dollars."""

    hardware_class: str
    emulated: bool
    model: str
    variant: str
    answers: int
    waited: float
    ran: float
    elapsed: float
    cost: float


def summaries(answers: Sequence[Answer]) -> list[Summary]:
    """A summary for each class, model and variant that answered, in that order."""
    groups: dict[tuple[str, str, str], list[tuple[Answer, RunReport]]] = {}
    for answer in answers:
        if answer.result is not None:
            report = answer.result.report
            key = report.hardware_class, answer.ask.model, report.variant
            groups.setdefault(key, []).append((answer, report))
    return [_summary(key, group) for key, group in sorted(groups.items())]


def _summary(key: tuple[str, str, str], group: Sequence[tuple[Answer, RunReport]]) -> Summary:
    hardware_class, model, variant = key
    return Summary(
        hardware_class=hardware_class,
        emulated=group[0][1].emulated,
        model=model,
        variant=variant,
        answers=len(group),
        waited=median(report.queue_wait for _, report in group),
        ran=median(report.run_time for _, report in group),
        elapsed=median(answer.elapsed for answer, _ in group),
        cost=mean(report.cost for _, report in group),
    )


def contrasts(answers: Sequence[Answer], most: int = EXAMPLES) -> list[Answer]:
    """Up to `most` answers that differ: one a model and class, models that ran on several classes first."""
    models: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        if answer.result is not None:
            models.setdefault(answer.ask.model, {}).setdefault(answer.result.report.hardware_class, answer)
    ranked = sorted(models.items(), key=lambda one: (-len(one[1]), one[0]))
    return [answer for _, classes in ranked for _, answer in sorted(classes.items())][:most]


def plain(answer: Answer) -> dict[str, Any]:
    """An answer in plain values; embeddings and the like are kept in full."""
    row: dict[str, Any] = {"model": answer.ask.model, "input": answer.ask.shown, "terms": dict(answer.ask.terms)}
    row |= {"elapsed": answer.elapsed, "error": answer.error}
    if answer.result is None:
        return row
    row["outputs"] = answer.result.outputs
    row.update(msgspec.to_builtins(answer.result.report))
    return row


@contextmanager
def demo_fleet(emulate: Collection[str], console: Console) -> Iterator[Fleet]:
    """A fleet with one CPU worker, each class of `emulate` on the CPU, and Flower, in a directory of its own.

    It is stopped whatever happens, and the directory is kept only after a failure, for its logs.

    Raises:
        StartError: it did not come up.
    """
    data = Path(tempfile.mkdtemp(prefix="taxiway-demo-"))
    try:
        with console.status("starting the broker, a router, workers and Flower"):
            fleet = _start(data, emulate)
        try:
            yield fleet
        finally:
            with console.status("stopping the fleet"):
                stop_fleet(data)
    except BaseException:
        console.print(f"the logs are in {data / 'logs'}")
        raise
    shutil.rmtree(data)


def _start(data: Path, emulate: Collection[str]) -> Fleet:
    command = own_command("up", "--data", str(data), "--detach", "--json", "--no-fetch")
    command += [word for name, count in DEMO_COUNTS.items() for word in ("--workers", f"{name}={count}")]
    command += [word for name in emulate for word in ("--emulate", name)]
    started = subprocess.run(command, env=in_tree(os.environ), capture_output=True, check=False, text=True)
    if started.returncode != 0:
        raise StartError(started.stderr.strip())
    return msgspec.json.decode(started.stdout, type=Fleet)


async def answer_all(url: str, asks: Sequence[Ask], console: Console) -> list[Answer]:
    """Submit everything at once and wait for every answer, showing how many are there on `console`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        names = dict.fromkeys(ask.model for ask in asks)
        rows = {name: bars.add_task(name, total=sum(ask.model == name for ask in asks)) for name in names}
        async with AsyncClient(url) as client:
            return await asyncio.gather(
                *(_answer(client, ask, lambda model: bars.advance(rows[model])) for ask in asks)
            )


async def _answer(client: AsyncClient, ask: Ask, done: Callable[[str], None]) -> Answer:
    begun = time.monotonic()
    try:
        result = await _patiently(lambda: _infer(client, ask))
    except TaxiwayError as error:
        return Answer(ask=ask, elapsed=time.monotonic() - begun, error=f"{type(error).__name__}: {error}")
    done(ask.model)
    return Answer(ask=ask, elapsed=time.monotonic() - begun, result=result)


async def _infer(client: AsyncClient, ask: Ask) -> Result:
    return await client.infer(ask.model, ask.inputs, parameters=ask.parameters, timeout=PATIENCE, **ask.terms)


async def _patiently(infer: Callable[[], Awaitable[Result]]) -> Result:
    """The answer; an overloaded fleet is retried after the delay it asked for."""
    for _ in range(_ATTEMPTS):
        try:
            return await infer()
        except OverloadedError as full:
            await asyncio.sleep(full.retry_after or _RETRY_AFTER)
    return await infer()
