"""The workloads' models, each with the single variant that every contestant runs, so the router has no choice."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from benchmarks.suite.workloads import KEEP, Plan, Workload
from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.settings import TREE, cache_directory

OWN = TREE / "benchmarks" / "models"
"""Models that only benchmarks have."""

CLASS = "cpu.batch"

_QUEUES = """
hardware:
  cpu.batch:
    device: cpu
    runtimes: [echo, onnx]
    max_batch: {rows}
    max_wait: {wait}
    horizon: 60
    nice: 0  # as urgent as the bare loop and the peers, though such a deadline is that of patient work
    price: {{usd_per_hour: 0.05}}
    warm: [{model}]
service:
  standard: {{deadline: 86400}}
default_service: standard
limits: {{keep_result: {keep}, keep_record: {keep}}}
"""


def write_catalogue(folder: Path, workloads: Iterable[Workload]) -> None:
    """Write a catalogue of the workloads' models into `folder`."""
    for workload in workloads:
        source = next(s / workload.model for s in (OWN, TREE / "models") if (s / workload.model).is_dir())
        model = yaml.safe_load((source / "model.yaml").read_text())
        model["variants"] = {workload.variant: model["variants"][workload.variant]}
        model["reference"] = workload.variant
        target = folder / workload.model
        target.mkdir(parents=True)
        (target / "model.yaml").write_text(yaml.safe_dump(model, sort_keys=False))
        for beside in source.iterdir():  # profiles, and the code that makes its artefacts
            if beside.name != "model.yaml":
                (target / beside.name).symlink_to(beside)


def plan_of(workload: Workload, models: Path) -> Plan:
    """The workload with its artefacts, fetched or derived if they are not in the cache; one process of one thread.

    Raises:
        ArtefactError: one is not available.
    """
    store, model = ArtefactStore(cache_directory(os.environ)), load_catalogue(models).resolve(workload.model)
    files = {role: str(path) for role, path in store.files(model, workload.variant).items()}
    photos = [str(store.path(model, name)) for name in model.artefacts if name.startswith("photo-")]
    return Plan(workload, files, photos)


def queues_of(model: str, *, rows: int, wait: float = 0.0, keep: int = KEEP) -> str:
    """A queues.yaml of one class and one model: rows per batch, seconds that it waits, seconds of results."""
    return _QUEUES.format(model=model, rows=rows, wait=wait, keep=keep)
