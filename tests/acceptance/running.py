"""The `taxiway` command, run as an operator runs it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from local.embedded import free_port
from local.fleet import LocalFleet


def taxiway(*arguments: str, timeout: float = 600, settings: Mapping[str, str] | None = None) -> str:
    """What the command line wrote to stdout; the developer's own TAXIWAY_ settings are left out, but for the cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TAXIWAY_")}
    if "TAXIWAY_CACHE" in os.environ:
        kept["TAXIWAY_CACHE"] = os.environ["TAXIWAY_CACHE"]
    kept |= settings or {}
    command = [sys.executable, "-m", "taxiway", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=kept, check=False)
    assert done.returncode == 0, f"taxiway {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def start_fleet(data: Path, *arguments: str, settings: Mapping[str, str] | None = None) -> LocalFleet:
    """A fleet that is ready, under these TAXIWAY_ variables; `taxiway("down", …)` stops it.

    Its ports are its own: fleets that start at the same time would all find the usual ones free.
    """
    ports = ["--port", str(free_port())]
    if "--no-flower" not in arguments:
        ports += ["--flower-port", str(free_port())]
    said = taxiway("up", "--data", str(data), "--detach", "--json", *ports, *arguments, settings=settings)
    return msgspec.json.decode(said, type=LocalFleet)
