"""A job's result: the answers of its rows, and where, how long and at what cost they ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.heartbeat import is_emulated
from tasks.models.profiles import generates, length_of
from tasks.models.tensor_spec import TensorSpec
from taxiway.contract.generation import total
from taxiway.contract.job import Result, RunReport
from taxiway.contract.values import ResultBlobs, to_wire
from taxiway.errors import TaxiwayError
from workers.device import Device
from workers.port import Row
from workers.stages.admit import named_row
from workers.stages.job import RunningJob, TextRun

_NO_TEXT = TextRun()


@dataclass(frozen=True, slots=True)
class RanBatch:
    """A batch that ran: its seconds and its rows."""

    seconds: float
    rows: int


def note(
    job: RunningJob, rows: Sequence[int], answers: Sequence[Row | TaxiwayError | None], batch: RanBatch
) -> TaxiwayError | None:
    """Record the rows' answers and their share of the batch in the job; returns the first error."""
    job.run_time += batch.seconds
    job.device_time += batch.seconds * len(rows) / batch.rows
    job.batch = max(job.batch, batch.rows)
    for row, answer in zip(rows, answers, strict=True):
        if isinstance(answer, TaxiwayError):
            return named_row(answer, row, job)
        job.answers[row] = answer
    return None


def answer_of(job: RunningJob, device: Device, blobs: ResultBlobs) -> Result:
    """The job's result in plain values: a single value for a request of one row, a list or tensor for several.

    `blobs` keeps values that are too large for it.

    Raises:
        TaxiwayError: an output cannot be encoded.
    """
    hardware_class = job.delivery.hardware_class
    waited = max(0.0, job.delivery.started - job.ticket.accepted)
    generation = job.generation or _NO_TEXT
    before = generation.kept.parts
    return Result(
        model=job.model.id,
        outputs={spec.name: to_wire(_output(job, spec), spec.name, blobs) for spec in _wanted(job)},
        single=job.single,
        report=RunReport(
            hardware_class=hardware_class,
            variant=job.variant,
            device=device.label,
            emulated=is_emulated(device.kind, job.hardware),
            batch=job.batch,
            queue_wait=waited,
            run_time=job.run_time + sum(part.seconds for part in before),
            cost=device.prices.get(hardware_class, job.ticket.prices[hardware_class]) / 3600 * job.device_time
            + job.billed
            + sum(part.cost for part in before),
            reason=job.ticket.reason,
            tokens=job.tokens if not before else total(generation.parts),
            parts=generation.parts if before or generation.kept.text else (),
            load_time=min(job.load_time, waited),  # by two clocks
            redone=job.times.redone,
            checkpoints="; ".join(job.times.notes),
        ),
    )


def generated_by(job: RunningJob) -> tuple[int, ...]:
    """The length of each generated answer; empty for other models."""
    if not generates(job.model):
        return ()
    return tuple(length_of(answer) for answer in job.answers if answer is not None)


def _wanted(job: RunningJob) -> list[TensorSpec]:
    """The requested outputs, in request order."""
    specs = {spec.name: spec for spec in job.model.outputs}
    return [specs[name] for name in job.outputs]


def _output(job: RunningJob, spec: TensorSpec) -> Any:
    values = [answer[spec.name] for answer in job.answers if answer is not None]
    if job.single:
        return values[0]
    alike = all(isinstance(value, np.ndarray) and value.shape == values[0].shape for value in values)
    return np.stack(values, spec.batch_axis or 0) if alike else values
