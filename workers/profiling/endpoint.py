"""Measures models on an endpoint: prompts of several lengths, alone and beside others, over the worker's own link."""

from __future__ import annotations

import asyncio
import datetime
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.document import Size
from tasks.models.model import Model
from tasks.models.profiles import ANSWER_BOUND, Measurement, Residuals, generates, ran_size
from tasks.queues.endpoints import Endpoint
from taxiway.errors import TaxiwayError
from workers.decide.endpoints import Learned, after, curve_of
from workers.device import Device
from workers.endpoints.http import EndpointLink
from workers.endpoints.protocol import AskItem, EndpointError, Exchange, open_protocol
from workers.port import Row
from workers.profiling.report import MeasuredOutcome

PROMPTS = (16, 256, 1024)
"""Tokens of the prompts, as far as the model takes them."""

ANSWER_TOKENS = 32
"""Most tokens of an answer."""

ROUNDS, QUICK_ROUNDS = 6, 2
"""How often each prompt is sent, alone and beside others."""

_BESIDE = 8  # most requests at the same time: a provider is not to be flooded
_STALL = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class _Run:
    """One answer: tokens of its prompt and of itself, the requests at that time, and its seconds."""

    read: int
    written: int
    rows: int
    first: float
    seconds: float


def measure_endpoint(
    endpoint: Endpoint, device: Device, key: str, models: Sequence[Model], variants: Sequence[str], *, rounds: int
) -> list[MeasuredOutcome]:
    """The outcome of each variant that runs on the endpoint; all of them if none is named."""
    return asyncio.run(_measure_all(endpoint, device, key, models, variants, rounds))


async def _measure_all(
    endpoint: Endpoint, device: Device, key: str, models: Sequence[Model], variants: Sequence[str], rounds: int
) -> list[MeasuredOutcome]:
    link = EndpointLink(endpoint, device.address, key, _STALL)
    await link.open()
    try:
        return [
            await _outcome(link, endpoint, model, name, rounds)
            for model in models
            for name, variant in sorted(model.variants.items())
            if variant.runtime == endpoint.protocol and (not variants or name in variants)
        ]
    finally:
        await link.close()


async def _outcome(link: EndpointLink, endpoint: Endpoint, model: Model, variant: str, rounds: int) -> MeasuredOutcome:
    called = endpoint.name_of(model.name, model.version, variant)
    if called is None:
        return MeasuredOutcome(model=model.id, variant=variant, skipped="queues.yaml does not name it for the endpoint")
    if model.pipeline not in ("chat", "generation", "text"):
        return MeasuredOutcome(model=model.id, variant=variant, skipped=f"no inputs can be made for {model.pipeline}")
    protocol, runs = open_protocol(endpoint.protocol), []
    beside = min(endpoint.slots, _BESIDE)
    prompts = [tokens for tokens in PROMPTS if tokens + ANSWER_TOKENS <= model.buckets[-1]] or [1]
    try:
        for tokens in prompts * rounds:
            for rows in sorted({1, beside}):
                items = [
                    protocol.prepare(model, model.variants[variant], called, _row(model, tokens), _parameters(model))
                    for _ in range(rows)
                ]
                runs += await asyncio.gather(*(_ask(link, model, item, rows) for item in items))
    except (EndpointError, TaxiwayError) as error:
        return MeasuredOutcome(model=model.id, variant=variant, error=str(error))
    return MeasuredOutcome(
        model=model.id, variant=variant, measurement=measurement_of(runs, model, variant, endpoint.slots)
    )


async def _ask(link: EndpointLink, model: Model, item: AskItem, rows: int) -> _Run:
    assert item.ask is not None
    exchange = Exchange(item.ask, ran_size(model, item.size, item.parameters, {}))
    await link.ask(exchange, lambda _: None)
    seconds = time.monotonic() - exchange.sent
    first = exchange.first - exchange.sent if exchange.first else seconds
    return _Run(exchange.prompt, exchange.tokens.output if generates(model) else 0, rows, first, seconds)


def measurement_of(runs: Sequence[_Run], model: Model, variant: str, slots: int) -> Measurement:
    """The curve that fits the runs, with the quantiles of the observed over the fitted times."""
    prior, learned = next(iter(model.variants[variant].profiles.values())), Learned()
    for run in runs:
        learned = after(
            learned,
            prior,
            read=run.read,
            written=run.written,
            rows=run.rows,
            first=run.first,
            seconds=run.seconds,
        )
    curve = curve_of(learned, prior, slots)
    ratios = [run.seconds / max(curve.latency(run.rows, run.read + run.written, run.read), 1e-6) for run in runs]
    p50, p90, p95, p99 = (max(float(one), 1e-3) for one in np.quantile(ratios, [0.5, 0.9, 0.95, 0.99]))
    return Measurement(
        date=datetime.date.today().isoformat(),
        load=0.0,
        memory=Size(0),
        peak=Size(0),
        base=curve.base,
        step=curve.step,
        slope=curve.slope,
        prompt_step=curve.prompt_step,
        prompt_slope=curve.prompt_slope,
        residual=Residuals(p50=p50, p90=p90, p95=p95, p99=p99),
    )


def _row(model: Model, tokens: int) -> Row:
    """A row with a prompt of about `tokens` tokens that is in no cache of the engine."""
    text = " ".join(f"{random.getrandbits(12):03x}" for _ in range(tokens))
    first = model.inputs[0].name
    return {first: {"messages": [{"role": "user", "content": text}]} if model.pipeline == "chat" else text}


def _parameters(model: Model) -> dict[str, object]:
    given = {name: spec.default for name, spec in model.parameters.items()}
    return {**given, ANSWER_BOUND: ANSWER_TOKENS} if generates(model) else given
