"""Hypothesis strategies: models, topologies and fleets as they may be, small enough that they meet each other."""

from __future__ import annotations

import string
from typing import Any

from hypothesis import strategies as st

from router.decide.classify import Allowance, Constraints, Needs
from router.decide.snapshot import FleetSnapshot
from tasks.document import Size
from tasks.heartbeat import DeviceFacts, variant_key
from tasks.models.catalogue import Model, Profile, TensorSpec, Variant
from tasks.topology import HardwareClass, Link, Price, Service, Topology
from taxiway.contract.keys import flow

KINDS = ("cpu", "cuda", "tpu")
RUNTIMES = ("onnx", "torch", "jax")
SETS = ("avx512f", "amx")
LABELS = ("edge", "lab")
CLASSES = ("cpu.batch", "gpu.realtime", "tpu.bulk")
VARIANTS = ("onnx-int8", "torch-bf16")
SERVICES = ("live", "standard")

seconds = st.floats(0.001, 20, allow_nan=False)
sizes = st.sampled_from([Size(2**20), Size(2**30), Size(2**34)])
names = st.text(string.ascii_lowercase, min_size=1, max_size=8)

json_scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()
json_values = st.recursive(
    json_scalars,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
    max_leaves=12,
)
"""Anything that JSON can say."""

profiles = st.builds(Profile, base=seconds, slope=seconds.map(lambda s: s / 100), floor=seconds, load=seconds)
residuals = st.lists(st.floats(1, 4), min_size=1, max_size=4).map(tuple)
"""By level, as `DeviceFacts` has them."""

allowances = st.floats(-1, 1).map(lambda left: Allowance("lab", "2026-01-31", 1.0, left, 3600.0))


def some(values: tuple[str, ...], least: int = 0) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(values), min_size=least, unique=True).map(tuple)


def mostly(value: Any, otherwise: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """`value` nine times in ten, so that what depends on several such draws still is as usual often enough."""
    return st.integers(0, 9).flatmap(lambda n: otherwise if n == 9 else st.just(value))


@st.composite
def models(draw: st.DrawFn) -> Model:
    variant = st.builds(
        Variant,
        runtime=st.sampled_from(RUNTIMES),
        memory=mostly(Size(2**20), sizes),
        max_batch=st.none() | st.integers(1, 8),
        instruction_sets=mostly((), some(SETS)),
        accuracy=st.none() | st.floats(0, 1),
        profiles=st.fixed_dictionaries({"cpu": profiles}, optional={"cuda": profiles, "tpu": profiles})
        | st.dictionaries(st.sampled_from(KINDS), profiles, min_size=1),
    )
    variants: dict[str, Variant] = draw(st.dictionaries(st.sampled_from(VARIANTS), variant, min_size=1))
    text = TensorSpec(name="text", datatype="BYTES", shape=(-1,))
    return Model(
        name="sentiment",
        version=1,
        summary="",
        licence="",
        pipeline="text",
        inputs=(text,),
        outputs=(text,),
        variants=variants,
        reference=next(iter(variants)),
    )


def topologies() -> st.SearchStrategy[Topology]:
    hardware = st.builds(
        HardwareClass,
        device=st.sampled_from(KINDS),
        runtimes=mostly(RUNTIMES, some(RUNTIMES, 1)),
        max_batch=st.integers(1, 16),
        max_wait=seconds.map(lambda s: s / 100),
        price=st.builds(Price, usd_per_hour=st.floats(0.01, 5), spot_usd_per_hour=st.floats(0.01, 5)),
        capacity=mostly("on-demand", st.just("spot")),
        reclaims_per_hour=st.floats(0, 20),
        horizon=st.floats(0, 20),
        link=st.builds(Link, delay=st.floats(0, 0.01), bytes_per_second=st.floats(1e6, 1e10)),
        reserve_for=mostly(None, st.sampled_from(SERVICES)),
        memory=mostly(None, sizes),
        labels=mostly(LABELS, some(LABELS)),
    )
    return st.builds(
        Topology,
        hardware=st.dictionaries(st.sampled_from(CLASSES), hardware, min_size=1),
        service=st.just({"standard": Service(deadline=5.0)}),
        default_service=st.just("standard"),
    )


@st.composite
def devices(draw: st.DrawFn, number: int, model: Model, topology: Topology) -> DeviceFacts:
    keys = tuple(variant_key(model.id, name) for name in model.variants)
    return DeviceFacts(
        worker=f"worker-{number}",
        hardware_class=draw(st.sampled_from(sorted(topology.hardware))),
        device="cpu:0",
        kind=draw(mostly("cpu", st.sampled_from(KINDS))),
        emulated=False,
        name="a device",
        memory_total=draw(mostly(2**34, sizes.map(int))),
        memory_free=0,
        instruction_sets=draw(mostly(SETS, some(SETS))),
        runtimes=draw(mostly(RUNTIMES, some(RUNTIMES))),
        warm=draw(some(keys)),
        unavailable=draw(mostly({}, st.dictionaries(st.sampled_from(keys), st.just("no such file"), max_size=1))),
        pace=draw(st.dictionaries(st.sampled_from(keys), st.floats(0.5, 2), max_size=2)),
        residual=draw(st.dictionaries(st.sampled_from(keys), residuals, max_size=2)),
        utilisation=draw(st.floats(0, 1)),
    )


@st.composite
def fleets(draw: st.DrawFn, model: Model, topology: Topology, *, most: int = 3) -> FleetSnapshot:
    count = draw(mostly(most, st.integers(0, most)))
    levels = st.tuples(*[st.floats(0, 5)] * 4)
    return FleetSnapshot(
        devices=tuple(draw(devices(n, model, topology)) for n in range(count)),
        work=draw(st.dictionaries(st.sampled_from(sorted(topology.hardware)), levels)),
        rates=draw(st.dictionaries(st.sampled_from([flow(c, model.id) for c in CLASSES]), st.floats(0, 50))),
        shadow=draw(st.dictionaries(st.sampled_from(sorted(topology.hardware)), st.floats(0, 1e-3))),
    )


def constraints(**fixed: Any) -> st.SearchStrategy[Constraints]:
    free: dict[str, st.SearchStrategy[Any]] = {
        "service": st.sampled_from(SERVICES),
        "locality": mostly(None, st.sampled_from(LABELS)),
        "min_accuracy": mostly(None, st.floats(0, 1)),
        "preemptible": st.booleans(),
        "classes": mostly(None, some(CLASSES, 1)),
    }
    return st.builds(Constraints, **(free | {name: st.just(value) for name, value in fixed.items()}))


def needs(**fixed: Any) -> st.SearchStrategy[Needs]:
    """The fields of `Constraints` are constraints; all else are a request's own needs."""
    hard = {name: fixed.pop(name) for name in Constraints.__slots__ if name in fixed}
    free: dict[str, st.SearchStrategy[Any]] = {
        "deadline": st.none() | st.floats(0.01, 100),
        "level": st.integers(0, 3),
        "rows": st.integers(1, 40),
        "size": st.integers(1, 64),
        "payload": st.integers(0, 2**20),
        "budget": mostly(None, st.floats(1e-6, 1)),
        "constraints": constraints(**hard),
        "allowance": mostly(None, allowances),
    }
    return st.builds(Needs, **(free | {name: st.just(value) for name, value in fixed.items()}))


@st.composite
def situations(draw: st.DrawFn, **fixed: Any) -> tuple[Model, Needs, Topology, FleetSnapshot]:
    """A request's model and needs, a topology, and a fleet of it."""
    model, topology = draw(models()), draw(topologies())
    return model, draw(needs(**fixed)), topology, draw(fleets(model, topology))
