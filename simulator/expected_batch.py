"""What a usual job of each model is like: what a new one finds beside it, learned from those that came."""

from __future__ import annotations

import numpy as np

from simulator.traces.workload import Figures, Job

MEMORY = 256
"""Jobs that the mean goes over, about."""


class Company:
    """Mean figures of each model's jobs, one a class: `Job.alone` and `Job.crowding`; infinite where it cannot run."""

    def __init__(self, models: int) -> None:
        self._alone: list[Figures | None] = [None] * models
        self._crowding: list[Figures | None] = [None] * models

    def meet(self, job: Job) -> None:
        """A job came."""
        self._alone[job.model] = _nearer(self._alone[job.model], job.alone)
        self._crowding[job.model] = _nearer(self._crowding[job.model], job.crowding)

    def alone(self, model: int) -> Figures:
        """Seconds of the usual job by itself; one such job came at least."""
        figures = self._alone[model]
        assert figures is not None
        return figures

    def crowding(self, model: int) -> Figures:
        """Seconds that the usual job adds to those beside it."""
        figures = self._crowding[model]
        assert figures is not None
        return figures


def _nearer(mean: Figures | None, figures: tuple[float, ...]) -> Figures:
    new = np.array(figures)
    if mean is None:
        return new
    able = np.isfinite(new)
    mean[able] += (new[able] - mean[able]) / MEMORY
    return mean
