"""Whether `make setup` installs torch: exit status 0 for yes, 1 for no, and why on stderr.

It does if this machine has a CUDA device, or if pip would install a build for the CPU. On most Linux machines pip would
install about 3 GB of CUDA libraries, which a user must request.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
from packaging.requirements import Requirement

from tasks.machine import look
from taxiway.release import version_of

_CUDA_NAMES = re.compile(r"^(nvidia|cuda)-")
_PATIENCE = 120  # seconds for pip to read one wheel's metadata
_ASK_PIP = (
    *("-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"),
    "--use-feature=fast-deps",  # reads the metadata out of a remote wheel, where an index does not serve it by itself
    *("--report", "-", "torch>=2.7"),
)


def brings_cuda(version: str, requirements: Sequence[str]) -> bool:
    """Whether torch of this version and with these requirements in its metadata installs CUDA on this machine."""
    if version.partition("+")[2].startswith("cpu"):
        return False
    parsed = [Requirement(text) for text in requirements]
    needed = [r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return any(_CUDA_NAMES.match(name) for name in needed)


def choose() -> tuple[bool, str]:
    """Whether to install torch, and why."""
    if version_of("torch") is not None:
        return False, f"torch {version_of('torch')} is installed"
    devices = look().cuda
    if devices:
        return True, f"installing torch: this machine has {', '.join(devices)}"
    offered = _offered()
    if offered is None:
        return False, "not installing torch: pip did not say which build it would install (`make torch` installs it)"
    version, requirements = offered
    if brings_cuda(version, requirements):
        return False, f"not installing torch: torch {version} needs about 3 GB of CUDA (`make torch` installs it)"
    return True, f"installing torch: torch {version} is a build for the CPU"


def _offered() -> tuple[str, list[str]] | None:
    """Version and requirements of the torch that pip would install; None if unknown."""
    try:
        asked = subprocess.run(
            [sys.executable, *_ASK_PIP], capture_output=True, timeout=_PATIENCE, check=True, stdin=subprocess.DEVNULL
        )
        report: dict[str, Any] = msgspec.json.decode(asked.stdout)
    except (subprocess.SubprocessError, msgspec.DecodeError):
        return None
    metadata = report["install"][0]["metadata"]
    return metadata["version"], metadata.get("requires_dist", [])


if __name__ == "__main__":
    wanted, why = choose()
    sys.stderr.write(f"{why}\n")
    sys.exit(0 if wanted else 1)
