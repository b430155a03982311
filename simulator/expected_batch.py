"""The expected batch: the typical jobs of each model that a new one runs with, learned from past jobs."""

from __future__ import annotations

import numpy as np

from simulator.traces.workload import Figures, Job

MEMORY = 256
"""Approximate number of jobs that the mean covers."""


class ExpectedBatch:
    """Mean figures of each model's jobs, one per class: `Job.alone` and `Job.crowding`; infinite if it cannot run."""

    def __init__(self, models: int) -> None:
        self._alone: list[Figures | None] = [None] * models
        self._crowding: list[Figures | None] = [None] * models

    def observe(self, job: Job) -> None:
        """Include a job in the means."""
        self._alone[job.model] = _nearer(self._alone[job.model], job.alone)
        self._crowding[job.model] = _nearer(self._crowding[job.model], job.crowding)

    def alone(self, model: int) -> Figures:
        """Seconds of the typical job by itself; requires at least one job of the model."""
        figures = self._alone[model]
        assert figures is not None
        return figures

    def crowding(self, model: int) -> Figures:
        """Seconds that the typical job adds to those in its batch."""
        figures = self._crowding[model]
        assert figures is not None
        return figures


def _nearer(mean: Figures | None, figures: tuple[float, ...]) -> Figures:
    new = np.array(figures)
    if mean is None:
        return new
    able, seen = np.isfinite(new), np.isfinite(mean)
    both = able & seen
    mean[both] += (new[both] - mean[both]) / MEMORY
    mean[able & ~seen] = new[able & ~seen]  # another service's jobs may run there
    return mean
