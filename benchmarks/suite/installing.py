"""Peers' virtual environments in the user's cache, created on first use and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tasks.settings import cache_directory

MODEL_PACKAGES = (*("hiredis", "msgspec", "numpy", "onnxruntime"), *("pillow", "pyyaml", "safetensors", "tokenizers"))
"""The batch loop's packages in the fleet's versions, so results do not depend on the runtime's version."""

_PATIENCE = 1200  # seconds for one installation


class AbsentError(Exception):
    """A peer cannot run on this machine; the text gives the reason."""


def interpreter(peer: str, packages: Sequence[str]) -> str:
    """The Python of a virtual environment that holds `packages` and the batch loop's.

    Raises:
        AbsentError: they cannot be installed.
    """
    folder = cache_directory(os.environ) / "benchmarks" / "peers" / peer
    return environment(folder, [*packages, *(f"{name}=={version(name)}" for name in MODEL_PACKAGES)])


def environment(folder: Path, wanted: Sequence[str]) -> str:
    """The Python of a virtual environment in `folder` that holds the `wanted` packages.

    Raises:
        AbsentError: they cannot be installed.
    """
    python, mark = folder / "bin" / "python", folder / "installed"
    if not mark.exists() or mark.read_text().split() != wanted:
        sys.stderr.write(f"installing {' '.join(wanted)} into {folder}\n")
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted])
        mark.write_text("\n".join(wanted))
    return str(python)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AbsentError(str(error)) from error
    if done.returncode:
        raise AbsentError((done.stderr or done.stdout).strip()[-300:])
