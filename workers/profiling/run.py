"""Starts a process for each variant, one after the other, and follows what it says."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tasks.document import convert
from tasks.heartbeat import variant_key
from tasks.models.catalogue import Model
from tasks.settings import TREE
from workers.device import Device
from workers.profiling.measure import Said
from workers.profiling.outcome import Outcome

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
"""As a worker with one thread runs (`workers.__main__`)."""


@dataclass(frozen=True, slots=True)
class Task:
    """A variant to measure. `left_out` says why it cannot be; `max_rows` is the largest batch of the device's kind."""

    model: Model
    variant: str
    models: Path
    device: Device
    max_rows: int
    quick: bool
    left_out: str = ""

    def command(self) -> list[str]:
        """The command that measures it."""
        options = {
            "--models": str(self.models),
            "--model": self.model.id,
            "--variant": self.variant,
            "--kind": self.device.kind,
            "--device": self.device.label,
            "--max-rows": str(self.max_rows),
        }
        flat = [text for pair in options.items() for text in pair]
        return [sys.executable, "-m", "workers.profiling.measure", *flat, *(["--quick"] if self.quick else [])]


def run_all(tasks: Sequence[Task], console: Console) -> list[Outcome]:
    """The outcome of each task, in order, with a progress bar on `console`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes = []
    with Progress(*columns, console=console) as bars:
        overall = bars.add_task("variants", total=len(tasks))
        for task in tasks:
            outcomes.append(_outcome(task, bars))
            bars.advance(overall)
    return outcomes


def _outcome(task: Task, bars: Progress) -> Outcome:
    if task.left_out:
        return Outcome(model=task.model.id, variant=task.variant, left_out=task.left_out)
    bar = bars.add_task(variant_key(task.model.id, task.variant), total=None)
    with tempfile.TemporaryFile("w+") as log:
        said = _follow(task, log, bars, bar)
        if said.measurement is None and not said.error:
            log.seek(0)
            said = Said(error=" ".join(log.read().strip().splitlines()[-3:]) or "its process ended without a word")
    bars.remove_task(bar)
    return Outcome(model=task.model.id, variant=task.variant, measurement=said.measurement, error=said.error)


def _follow(task: Task, log: IO[str], bars: Progress, bar: TaskID) -> Said:
    """Run the task's process to its end; the last that it said. The process ends with this one."""
    last = Said()
    environment = os.environ | _ONE_THREAD
    with subprocess.Popen(
        task.command(), cwd=TREE, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:
        assert process.stdout is not None
        ours = (line for line in process.stdout if line.startswith("{"))  # a runtime may print what it likes
        try:
            for line in ours:
                last = convert(msgspec.json.decode(line), Said)
                name = variant_key(task.model.id, task.variant)
                bars.update(bar, description=f"{name} {last.next}", completed=last.done, total=last.of or None)
        finally:
            process.kill()
    return last
