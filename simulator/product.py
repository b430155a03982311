"""The fleet file in the product's own values: what its decisions take for queues.yaml and the catalogue."""

from __future__ import annotations

from simulator.fleet import SERVICES, Fleet
from tasks.document import Size
from tasks.models.catalogue import Model, Profile, TensorSpec, Variant
from tasks.topology import HardwareClass, Scaling, Service, Topology


def topology_of(fleet: Fleet) -> Topology:
    """The fleet file's classes and services as queues.yaml would have them."""
    hardware = {
        name: HardwareClass(
            device="cpu",
            runtimes=("echo",),
            max_batch=device.max_batch,
            max_wait=device.max_wait,
            max_run=device.max_run,
            horizon=device.horizon,
            price=device.price,
            capacity="spot" if device.spot else "on-demand",
            reclaims_per_hour=device.reclaims_per_hour,
            reserve_for=device.reserve_for,
            target=device.target,
            scaling=Scaling(minimum=device.minimum, maximum=device.count, start=device.start),
        )
        for name, device in fleet.classes.items()
    }
    services = {
        name: Service(deadline=terms.deadline, priority=terms.priority, preemptible=terms.preemptible)
        for name, terms in zip(SERVICES, fleet.services, strict=True)
    }
    return Topology(hardware=hardware, service=services, default_service=SERVICES[1])


def model_of(name: str) -> Model:
    """A stand-in for a model of the fleet file: the router reads its name, and its one variant's."""
    tensor = TensorSpec("rows", "FP32", (-1,))
    variant = Variant(runtime="echo", memory=Size(0), profiles={"cpu": Profile(0.0, 0.0)})
    return Model(
        name=name,
        version=1,
        summary="",
        licence="",
        pipeline="tensors",
        inputs=(tensor,),
        outputs=(tensor,),
        variants={"default": variant},
        reference="default",
    )
