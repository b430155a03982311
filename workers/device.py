"""The device that this process drives, and the process's configuration.

A device has a kind, memory and a utilisation; `WorkerContext` is its hardware class, its label and the worker's files.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
import pynvml

from tasks.heartbeat import lacking
from tasks.machine import cpu_facts, look
from tasks.models.folder import ModelsFolder
from tasks.models.model import Model, Variant
from tasks.queues.endpoints import Endpoint
from tasks.queues.hours import closes_in
from tasks.settings import Settings, SettingsError
from tasks.topology import DeviceKind, HardwareClass, Topology
from taxiway.errors import ModelUnavailableError, UnknownModelError

if TYPE_CHECKING:
    from taxiway.sealing import SealKeys

BUILT_IN = ("echo", "python")
"""Runtimes that need no package."""

USD_PER_HOUR = "TAXIWAY_USD_PER_HOUR"
"""The variable with the price of the node that a worker is on."""

_ADDRESS = re.compile(r"^(cpu|cuda|tpu|mps|endpoint)(?::(\d+)(?:-(\d+))?)?$")

logger = logging.getLogger(__name__)


class DeviceMissingError(Exception):
    """The requested device is not on this machine, or not in queues.yaml."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device."""

    kind: DeviceKind
    """Its real kind: an emulated class runs on the CPU."""
    label: str
    """The operator's name for it."""
    address: str
    """The runtimes' name for it; of an endpoint, one of its `replicas`."""
    name: str
    memory: int
    """Bytes."""
    instruction_sets: tuple[str, ...]
    runtimes: tuple[str, ...]
    emulated: bool = False
    prices: Mapping[str, float] = field(default_factory=dict)
    """US dollars an hour that its node costs, by the class of its worker, if the worker has them."""


def find_device(hardware: HardwareClass, label: str, *, emulate: bool, port: int = 0) -> Device:
    """The device `label` (`cpu:0`, `cpu:0-3`, `cuda:0`, `tpu:0`; empty for the first) for a worker of the class.

    With `emulate` the CPU stands in for the class's kind of device, marked as emulated. `port` as in `endpoint_device`.

    Raises:
        DeviceMissingError: the machine has no such device, or the label is for another kind.
    """
    kind = hardware.device
    label = label or f"{kind}:0"
    match = _ADDRESS.match(label)
    if match is None or match[1] != kind:
        raise DeviceMissingError(f"expected a device like {kind}:0 for a class of {kind} devices, got {label!r}")
    if hardware.endpoint is not None:
        return endpoint_device(hardware.endpoint, label, port)
    if emulate and kind != "cpu":
        return replace(_cpu(label), emulated=True)
    return _FIND[kind](label)


def unfit(variant: Variant, device: Device) -> str:
    """Why the device cannot run the variant; empty if it can."""
    missing = lacking(variant.instruction_sets, device.instruction_sets)
    if variant.on_endpoint:
        return "it runs on endpoints"
    if variant.runtime not in device.runtimes:
        return f"{variant.runtime} is not installed"
    if device.kind not in variant.profiles:
        return f"model.yaml has no profile for {device.kind}: it is not meant to run there"
    return f"the device lacks {', '.join(missing)}" if missing else ""


def memory_free(device: Device) -> int:
    """Bytes free on the device now."""
    if device.kind == "cuda":
        return int(pynvml.nvmlDeviceGetMemoryInfo(_nvml_handle(device.label)).free)
    if device.kind == "endpoint":
        return 0
    if device.kind == "tpu":
        stats = _tpu_devices()[_index(device.label)].memory_stats() or {}
        return device.memory - int(stats.get("bytes_in_use", 0))
    return int(psutil.virtual_memory().available)


def utilisation(device: Device) -> float | None:
    """Fraction of time that the device was busy, 0 to 1, if the device measures it (NVIDIA)."""
    if device.kind != "cuda":
        return None
    pynvml.nvmlInit()
    return float(pynvml.nvmlDeviceGetUtilizationRates(_nvml_handle(device.label)).gpu) / 100


def endpoint_device(endpoint: Endpoint, label: str, port: int = 0) -> Device:
    """The replica of an endpoint with this label, such as `endpoint:0`, on this `port` if its URL has port 0.

    Raises:
        DeviceMissingError: there is none.
    """
    replicas, index = endpoint.replicas, _index(label)
    if index >= len(replicas):
        raise DeviceMissingError(f"no {label}: the class has {len(replicas)} endpoint(s)")
    address, parts = replicas[index], urlsplit(replicas[index])
    if parts.port == 0:
        address = address.replace(parts.netloc, f"{parts.netloc.removesuffix('0')}{port}", 1)
    return Device(
        kind="endpoint",
        label=label,
        address=address,
        name=urlsplit(address).netloc.rpartition("@")[2],
        memory=0,
        instruction_sets=(),
        runtimes=(endpoint.protocol,),
    )


def _cpu(label: str) -> Device:
    return _here("cpu", label, "cpu", _cpu_name(), look().memory)


def _cuda(label: str) -> Device:
    names, index = look().cuda, _index(label)
    if index >= len(names):
        raise DeviceMissingError(f"no NVIDIA device {label}: this machine has {len(names)}")
    handle = _nvml_handle(label)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return _here("cuda", label, label, names[index], memory, f"sm_{major}{minor}")


def _tpu(label: str) -> Device:
    devices, index = _tpu_devices() if look().tpu_chips else [], _index(label)
    if index >= len(devices):
        raise DeviceMissingError(f"no TPU {label}: JAX sees {len(devices)} on this machine")
    memory = int((devices[index].memory_stats() or {}).get("bytes_limit", 0))
    return _here("tpu", label, label, str(devices[index].device_kind), memory)


def _here(kind: DeviceKind, label: str, address: str, name: str, memory: int, *own_instructions: str) -> Device:
    """A device of this machine, with the machine's runtimes and instruction sets."""
    machine = look()
    return Device(
        kind=kind,
        label=label,
        address=address,
        name=name,
        memory=memory,
        instruction_sets=(*machine.instruction_sets, *own_instructions),
        runtimes=(*sorted(machine.runtimes), *BUILT_IN),
    )


def _mps(label: str) -> Device:
    """Apple's GPU, which shares the machine's memory. Not tested on a real one."""
    import torch  # the import takes seconds; only workers of such a class get here

    if not torch.backends.mps.is_available():
        raise DeviceMissingError(f"no Metal device {label}: PyTorch sees none on this machine")
    return replace(_cpu(label), kind="mps", address="mps", runtimes=("torch", *BUILT_IN))


def _tpu_devices() -> list[Any]:
    import jax  # the import takes seconds; only machines with a TPU get here

    return [device for device in jax.devices() if device.platform == "tpu"]


def _index(label: str) -> int:
    match = _ADDRESS.match(label)
    return int(match[2] or 0) if match else 0


def _nvml_handle(label: str) -> Any:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByIndex(_index(label))


_FIND: Mapping[DeviceKind, Callable[[str], Device]] = {"cpu": _cpu, "cuda": _cuda, "tpu": _tpu, "mps": _mps}


def _cpu_name() -> str:
    for line in cpu_facts():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "CPU"


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The class that a worker serves, and its device."""

    hardware_class: str
    device: str = ""
    """Empty: the first of the class's kind."""
    emulate: bool = False
    threads: int = 1
    alive: Path | None = None
    """A file that is touched after each heartbeat that the store accepted."""
    endpoint_key: str = field(default="", repr=False)
    """The API key of the class's endpoint, if it has one."""
    engine_port: int = 0
    """The port of an engine that was started with the worker on a free one."""
    usd_per_hour: float | None = None
    """Price of the node that it is on; None if it is the class's."""
    joined: bool = False
    """Its account at the broker may serve its class alone."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The configuration of one worker process."""

    options: WorkerOptions
    settings: Settings
    topology: Topology
    folder: ModelsFolder
    seal_keys: SealKeys | None = None

    @property
    def hardware(self) -> HardwareClass:
        """The class that the worker serves."""
        return self.topology.hardware[self.options.hardware_class]

    def closes(self, now: float) -> float:
        """Seconds from `now` until the class's hours end; infinite if it has none."""
        return closes_in(self.hardware.available, now)

    def warm(self) -> list[Model]:
        """The models that the class keeps warm; those that the catalogue does not serve are logged and skipped."""
        found: list[Model] = []
        for name in self.hardware.warm:
            try:
                found.append(self.folder.catalogue.resolve(name))
            except (UnknownModelError, ModelUnavailableError) as error:
                extra = {"class": self.options.hardware_class, "reason": error.message}
                logger.error("warm model of the class is not served", extra=extra)
        return found


def options_from(environment: Mapping[str, str], topology: Topology) -> WorkerOptions:
    """The options in TAXIWAY_CLASS, _DEVICE, _EMULATE, _THREADS, _ALIVE, _ENGINE_PORT, _USD_PER_HOUR and _JOINED.

    The key of an endpoint is in the variable that queues.yaml names.

    Raises:
        SettingsError: a variable is missing or wrong.
    """
    hardware_class = environment.get("TAXIWAY_CLASS", "")
    if hardware_class not in topology.hardware:
        raise SettingsError("TAXIWAY_CLASS", f"one of {sorted(topology.hardware)}", hardware_class or None)
    threads = environment.get("TAXIWAY_THREADS") or "1"
    if not threads.isdecimal() or int(threads) < 1:
        raise SettingsError("TAXIWAY_THREADS", "an integer >= 1", threads)
    alive = Path(environment["TAXIWAY_ALIVE"]) if environment.get("TAXIWAY_ALIVE") else None
    if alive is not None and not alive.parent.is_dir():
        raise SettingsError("TAXIWAY_ALIVE", "a file in a directory that exists", str(alive))
    return WorkerOptions(
        hardware_class=hardware_class,
        device=environment.get("TAXIWAY_DEVICE", ""),
        emulate=environment.get("TAXIWAY_EMULATE", "") not in ("", "0"),
        threads=int(threads),
        alive=alive,
        engine_port=int(environment.get("TAXIWAY_ENGINE_PORT") or 0),
        endpoint_key=_endpoint_key(environment, topology.hardware[hardware_class].endpoint),
        usd_per_hour=_price(environment.get(USD_PER_HOUR, "")),
        joined=environment.get("TAXIWAY_JOINED", "") not in ("", "0"),
    )


def _price(text: str) -> float | None:
    try:
        price = float(text or "nan")
    except ValueError:
        price = -1.0
    if not (price > 0 or not text) or math.isinf(price):
        raise SettingsError(USD_PER_HOUR, "US dollars an hour, above 0", text)
    return price if text else None


def _endpoint_key(environment: Mapping[str, str], endpoint: Endpoint | None) -> str:
    if endpoint is None or endpoint.key_env is None:
        return ""
    key = environment.get(endpoint.key_env, "")
    if not key:
        raise SettingsError(endpoint.key_env, "the API key of the class's endpoint", None)
    return key
