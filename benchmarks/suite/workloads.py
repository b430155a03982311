"""The workloads of every contestant, W0 to W3. The servers' virtual environments import this: standard library only.

A contestant's processes read their `Plan` from one environment variable.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "TAXIWAY_BENCHMARK"
"""The variable with the plan, for a contestant's processes."""

TEXT = "What a smooth and friendly flight, thank you!"
"""The echoed text: short, like sentiment's inputs."""

TOKENS = 32
"""Token ids in a W2 request."""

PAYLOADS = 64
"""Distinct requests of a workload, sent in rotation."""

KEEP = 60
"""Seconds that results are kept by the fleet and by Celery."""

SEED = 7

_VOCABULARY = range(1000, 30000)  # MiniLM's whole words


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of request and how it is served.

    Attributes:
        model: in the catalogue that `benchmarks.suite.catalogue` writes; `variant` is the only one in it.
        max_batch: most rows in a batch.
        wait: seconds that a batch waits to fill, for servers that need the setting.
        outstanding: requests at once when saturated.
        computes: whether it uses the processor, so every core should run it; otherwise one process has the device.
        reentrant: whether one loaded model may run several batches at once.
    """

    name: str
    title: str
    model: str
    variant: str
    max_batch: int
    wait: float
    outstanding: int = 256
    unit: str = "items"
    computes: bool = True
    reentrant: bool = False


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W0", "echo of a short text", "echo", "echo", 64, wait=0.0, computes=False),
        Workload("W1", "emulated device, 5 ms + 0.1 ms a row", "paced", "paced", 32, wait=0.002, computes=False),
        Workload(
            "W2", "MiniLM on ONNX Runtime, 32 token ids", "minilm-ids", "onnx-int8", 32, wait=0.002, reentrant=True
        ),
        Workload(
            "W3", "JPEG to label, EfficientNet-lite0", "classify-image", "onnx-int8", 16, wait=0.002, reentrant=True
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How a contestant serves a workload: `workers` processes of `threads` threads, on a loopback port.

    `files` are the variant's artefacts by role, `photos` the JPEG files of W3.
    """

    workload: Workload
    files: Mapping[str, str]
    photos: Sequence[str] = ()
    workers: int = 1
    threads: int = 1
    port: int = 0

    @property
    def processes(self) -> int:
        """Processes for servers without batching: one for a device, or one per core without a device."""
        return 1 if self.workload.name == "W1" else max(self.workers, os.cpu_count() or 1)

    @property
    def rows(self) -> int:
        """Most rows in a process's batch: few outstanding requests are shared among the processes."""
        return min(self.workload.max_batch, -(-self.workload.outstanding // self.workers))

    def environment(self) -> dict[str, str]:
        """A process's variables: this plan, and the threads of its numeric libraries."""
        return {
            VARIABLE: json.dumps({**dataclasses.asdict(self), "workload": self.workload.name}),
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
        }


def plan_from_environment() -> Plan:
    """The plan of this process's contestant."""
    given = json.loads(os.environ[VARIABLE])
    return Plan(**{**given, "workload": WORKLOADS[given["workload"]]})


def payloads(plan: Plan) -> list[Any]:
    """The requests' payloads in order: JSON values, or a JPEG's bytes for W3."""
    draw = random.Random(SEED)
    match plan.workload.name:
        case "W2":
            return [_token_ids(draw) for _ in range(PAYLOADS)]
        case "W3":
            photos = [Path(photo).read_bytes() for photo in plan.photos]
            return [draw.choice(photos) for _ in range(PAYLOADS)]
        case _:
            return [f"{TEXT} {number}" for number in range(PAYLOADS)]


def row_of(workload: Workload, payload: Any) -> dict[str, Any]:
    """The payload as the model's inputs by name. A photograph may be bytes or base64 text."""
    if workload.name == "W2":
        return dict(payload)
    if workload.name == "W3":
        return {"image": base64.b64decode(payload) if isinstance(payload, str) else payload}
    return {"payload": payload}


def _token_ids(draw: random.Random) -> dict[str, list[int]]:
    ids = [101, *draw.choices(_VOCABULARY, k=TOKENS - 2), 102]  # BERT's [CLS] and [SEP] around the words
    return {"input_ids": ids, "attention_mask": [1] * TOKENS}
