"""What engines tell of themselves: requests that run and wait there, and how full their cache is. Pure.

Sources: vLLM, docs/usage/metrics.md; SGLang, references/production_metrics; llama.cpp, tools/server/README.md; TGI,
reference/metrics; Triton, user_guide/metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tasks.heartbeat import Engine

METRICS, SLOTS = "/metrics", "/slots"
"""Paths at an engine's root: metrics in Prometheus's text format, and llama.cpp's list of slots."""

FULL = 0.97
"""Share of its cache from which on an engine gets no further request: it would evict others."""

_MOST = 1e6  # requests; an engine that tells of more is not believed
_Figure = Literal["running", "waiting", "cache"]

_FIGURES: Mapping[str, _Figure] = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "cache",
    "vllm:gpu_cache_usage_perc": "cache",
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "waiting",
    "sglang:token_usage": "cache",
    "llamacpp:requests_processing": "running",
    "llamacpp:requests_deferred": "waiting",
    "llamacpp:kv_cache_usage_ratio": "cache",
    "tgi_batch_current_size": "running",
    "tgi_queue_size": "waiting",
    "nv_inference_pending_request_count": "waiting",
}


class _Slot(msgspec.Struct, frozen=True):
    is_processing: bool


_slots = msgspec.json.Decoder(Annotated[list[_Slot], msgspec.Meta(max_length=10_000)]).decode


def read_metrics(body: bytes) -> Engine | None:
    """What the metrics of an engine that we know tell, over all of its models; None of any other."""
    wanted = [line for line in body.decode(errors="replace").splitlines() if _name(line) in _FIGURES]
    found: dict[_Figure, list[float]] = {}
    try:
        for family in text_string_to_metric_families("\n".join(wanted) + "\n"):
            for sample in family.samples:
                found.setdefault(_FIGURES[sample.name], []).append(_bounded(sample.value))
    except (ValueError, KeyError, IndexError):  # the parser's errors for text of another format
        return None
    if not found:
        return None
    return Engine(
        running=round(min(sum(found.get("running", ())), _MOST)),
        waiting=round(min(sum(found.get("waiting", ())), _MOST)),
        cache=min(max(found.get("cache", ()), default=0.0), 1.0),
    )


def read_slots(body: bytes) -> Engine | None:
    """What llama.cpp's list of slots tells; None of anything else."""
    try:
        return Engine(running=sum(slot.is_processing for slot in _slots(body)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def is_full(engine: Engine | None) -> bool:
    """Whether a further request would wait in the engine, where it cannot be moved."""
    return engine is not None and (engine.waiting > 0 or engine.cache >= FULL)


def _name(line: str) -> str:
    return line.partition("{")[0].partition(" ")[0]


def _bounded(value: float) -> float:
    return min(max(value, 0.0), _MOST) if math.isfinite(value) else 0.0
