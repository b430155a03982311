"""What this machine has, found without importing a runtime."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml

from tasks.models.files import registered
from taxiway.release import version_of

RUNTIMES = {"onnx": "onnxruntime", "jax": "jax", "torch": "torch"}
"""The distribution that brings each runtime."""

_SHOWN_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "sve")
_GOOGLE = "0x1ae0"
_TPU_CHIPS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # jax 0.10, _src/hardware_utils.py


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine at one instant. Memory in bytes; `cuda` names its NVIDIA devices; `runtimes` maps name to version."""

    cores: int
    memory: int
    memory_free: int
    instruction_sets: tuple[str, ...]
    cuda: tuple[str, ...]
    tpu_chips: int
    runtimes: dict[str, str]

    def devices(self, kind: str) -> int:
        """How many devices of a kind it has; the CPU counts by physical cores, and endpoints are elsewhere."""
        apple = platform.system() == "Darwin" and platform.machine() == "arm64"
        return {"cpu": self.cores, "cuda": len(self.cuda), "tpu": self.tpu_chips, "mps": int(apple), "endpoint": 0}[
            kind
        ]


def look() -> Machine:
    """This machine now."""
    memory = psutil.virtual_memory()
    return Machine(
        cores=_cores(),
        memory=memory.total,
        memory_free=memory.available,
        instruction_sets=_instruction_sets(),
        cuda=_cuda_devices(),
        tpu_chips=_tpu_chips(),
        runtimes=_installed(RUNTIMES),
    )


def memory_of_container(groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this container may use, by its control group (version 2 or 1); None without a limit."""
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (groups / file).read_text().strip()
        except OSError:
            continue
        limit = int(text) if text.isdecimal() else None
        return limit if limit is not None and limit < psutil.virtual_memory().total else None
    return None


def _cores() -> int:
    """Physical cores, and no more than this process may use (a container's share of a large machine)."""
    process = psutil.Process()
    usable = len(process.cpu_affinity() or [0]) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or usable, usable)


def cpu_facts(file: Path = Path("/proc/cpuinfo")) -> Sequence[str]:
    """The lines `name: value` of Linux about the processor; without them (macOS) what Python knows of it."""
    try:
        return file.read_text().splitlines()
    except OSError:
        features = "asimd" if platform.machine() == "arm64" else ""
        return f"model name: {platform.processor() or platform.machine()}", f"Features: {features}"


def _instruction_sets() -> tuple[str, ...]:
    for line in cpu_facts():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            return tuple(known for known in _SHOWN_SETS if known in flags)
    return ()


def _cuda_devices() -> tuple[str, ...]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles)
    finally:
        pynvml.nvmlShutdown()


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _tpu_chips() -> int:
    chips = 0
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        if vendor.read_text().strip() == _GOOGLE:
            chips += vendor.with_name("device").read_text().strip() in _TPU_CHIPS
    return chips


def _installed(distributions: Mapping[str, str]) -> dict[str, str]:
    """The versions of those that are installed, and of the runtimes that other packages register, by name."""
    found = {name: version_of(distribution) for name, distribution in distributions.items()}
    others = {name: point.dist.version if point.dist else "" for name, point in registered("runtimes").items()}
    return others | {name: version for name, version in found.items() if version is not None}
