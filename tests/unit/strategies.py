"""Hypothesis strategies: models, topologies and fleets as they may be, small enough that they meet each other.

Each strategy is made once: to make one takes Hypothesis longer than to draw from it.
"""

import string
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec
from hypothesis import strategies as st

from router.decide.classify import Allowance, Constraints, Needs
from router.decide.plan import Cell, ClassPlan, Density, Depth, Handover, Plan
from router.decide.snapshot import FleetSnapshot
from tasks.document import Size
from tasks.heartbeat import DeviceFacts, variant_key
from tasks.models.model import Model, Profile, Variant
from tasks.topology import HardwareClass, Link, Price, Service, Topology
from taxiway.contract.keys import flow
from tests.builders import a_text_model

KINDS = ("cpu", "cuda", "tpu")
RUNTIMES = ("onnx", "torch", "jax")
SETS = ("avx512f", "amx")
LABELS = ("edge", "lab")
CLASSES = ("cpu.batch", "gpu.realtime", "tpu.bulk")
VARIANTS = ("onnx-int8", "torch-bf16")
SERVICES = ("live", "standard")
Situation = tuple[Model, Needs, Topology, FleetSnapshot]
"""A request's model and needs, a topology, and a fleet of it."""

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


@cache
def some(values: tuple[str, ...], least: int = 0) -> st.SearchStrategy[tuple[str, ...]]:
    """At least `least` (0 or 1) of the values, in their order."""
    chosen = st.integers(least, 2 ** len(values) - 1)
    return chosen.map(lambda bits: tuple(value for n, value in enumerate(values) if bits >> n & 1))


def mostly(value: Any, otherwise: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """`value` nine times in ten, so that what depends on several such draws still is as usual often enough."""
    usual = st.just(value)
    return st.integers(0, 9).flatmap(lambda n: otherwise if n == 9 else usual)


def keyed(keys: tuple[str, ...], values: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    """A value for at least `least` (0 or 1) of the keys."""
    every = [st.fixed_dictionaries(dict.fromkeys(chosen, values)) for chosen in subsets(keys)[least:]]
    return st.integers(0, len(every) - 1).flatmap(every.__getitem__)


def subsets(keys: tuple[str, ...]) -> list[list[str]]:
    return [[key for n, key in enumerate(keys) if bits >> n & 1] for bits in range(2 ** len(keys))]


@cache
def models() -> st.SearchStrategy[Model]:
    variant = st.builds(
        Variant,
        runtime=st.sampled_from(RUNTIMES),
        memory=mostly(Size(2**20), sizes),
        max_batch=st.none() | st.integers(1, 8),
        instruction_sets=mostly((), some(SETS)),
        accuracy=st.none() | st.floats(0, 1),
        profiles=keyed(KINDS, profiles, 1),
    )
    return keyed(VARIANTS, variant, 1).map(lambda variants: a_text_model(**variants))


@cache
def topologies() -> st.SearchStrategy[Topology]:
    hardware = st.builds(
        HardwareClass,
        device=st.sampled_from(KINDS),
        runtimes=mostly(RUNTIMES, some(RUNTIMES, 1)),
        max_batch=st.integers(1, 16),
        max_wait=seconds.map(lambda s: s / 100),
        price=st.builds(
            Price,
            usd_per_hour=st.floats(0.01, 5),
            spot_usd_per_hour=st.floats(0.01, 5),
            usd_per_request=mostly(0.0, st.floats(0, 0.01)),
        ),
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
        hardware=keyed(CLASSES, hardware, 1),
        service=st.just({"standard": Service(deadline=5.0)}),
        default_service=st.just("standard"),
    )


_KEYS = tuple(variant_key("sentiment:1", name) for name in VARIANTS)
_devices = st.builds(
    DeviceFacts,
    worker=st.just(""),
    hardware_class=st.sampled_from(CLASSES),
    device=st.just("cpu:0"),
    kind=mostly("cpu", st.sampled_from(KINDS)),
    emulated=st.just(False),
    name=st.just("a device"),
    memory_total=mostly(2**34, sizes.map(int)),
    memory_free=mostly(2**34, st.integers(0, 2**34)),
    memory_used=mostly(0, st.integers(0, 2**34)),
    instruction_sets=mostly(SETS, some(SETS)),
    runtimes=mostly(RUNTIMES, some(RUNTIMES)),
    warm=some(_KEYS),
    unavailable=mostly({}, keyed(_KEYS, st.just("no such file"))),
    pace=keyed(_KEYS, st.floats(0.5, 2)),
    residual=keyed(_KEYS, residuals),
    utilisation=st.floats(0, 1),
)
_fleets = st.builds(
    FleetSnapshot,
    devices=mostly(3, st.integers(0, 3)).flatmap([st.tuples(*[_devices] * n) for n in range(4)].__getitem__),
    work=keyed(CLASSES, st.tuples(*[st.floats(0, 5)] * 4)),
    rates=keyed(tuple(flow(name, "sentiment:1") for name in CLASSES), st.floats(0, 50)),
    shadow=keyed(CLASSES, st.floats(0, 1e-3)),
)


def fleets(model: Model, topology: Topology) -> st.SearchStrategy[FleetSnapshot]:
    return _fleets.map(lambda drawn: _of(drawn, model, topology))


def _of(drawn: FleetSnapshot, model: Model, topology: Topology) -> FleetSnapshot:
    """The fleet, where its devices and work are of the topology's classes and they know the model's variants alone."""
    keys, names = {variant_key(model.id, name) for name in model.variants}, sorted(topology.hardware)

    def known(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in keys or name in names}

    def placed(number: int, device: DeviceFacts) -> DeviceFacts:
        return msgspec.structs.replace(
            device,
            worker=f"worker-{number}",
            hardware_class=names[CLASSES.index(device.hardware_class) % len(names)],
            warm=tuple(key for key in device.warm if key in keys),
            unavailable=known(device.unavailable),
            pace=known(device.pace),
            residual=known(device.residual),
        )

    devices = tuple(placed(number, device) for number, device in enumerate(drawn.devices))
    return replace(drawn, devices=devices, work=known(drawn.work), shadow=known(drawn.shadow))


@cache
def constraints(**fixed: Any) -> st.SearchStrategy[Constraints]:
    free: dict[str, st.SearchStrategy[Any]] = {
        "service": st.sampled_from(SERVICES),
        "locality": mostly(None, st.sampled_from(LABELS)),
        "min_accuracy": mostly(None, st.floats(0, 1)),
        "preemptible": st.booleans(),
        "classes": mostly(None, some(CLASSES, 1)),
    }
    return st.builds(Constraints, **(free | {name: st.just(value) for name, value in fixed.items()}))


@cache
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


@cache
def situations(**fixed: Any) -> st.SearchStrategy[Situation]:
    drawn = st.tuples(models(), needs(**fixed), topologies(), _fleets)
    return drawn.map(lambda one: (*one[:3], _of(one[3], one[0], one[2])))


@cache
def plans() -> st.SearchStrategy[Plan]:
    """Plans as a tuner should not make them, too: classes that do not exist, or may not run what is planned there."""
    named = st.sampled_from([*CLASSES, "gone"])
    cell = st.builds(
        Cell,
        model=st.just("sentiment:1"),
        service=st.sampled_from(SERVICES),
        locality=mostly(None, st.sampled_from(LABELS)),
        classes=st.lists(named, min_size=1, max_size=4).map(tuple),
        deadline=st.none() | st.floats(0.001, 100),
        handover=mostly(
            None, st.builds(Handover, former=named, devices=st.integers(0, 3), latest=st.floats(0, 2, allow_nan=False))
        ),
    )
    rule = st.builds(Density, target=st.floats(0.01, 4), keep=st.none() | st.floats(0, 600)) | st.builds(
        Depth, jobs=st.floats(0.1, 100), keep=st.floats(0, 600), poll=st.floats(0, 60)
    )
    return st.builds(
        Plan,
        number=st.integers(0, 9),
        made=st.just(0.0),
        cells=st.lists(cell, max_size=6).map(tuple),
        classes=st.dictionaries(named, st.builds(ClassPlan, rule=rule, devices=st.integers(0, 5)), max_size=4),
    )
