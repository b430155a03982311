"""Ends the worker that runs it, also where the function runs in a child process of the worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

_COMMANDS = {b"--class", b"tests.forked"}
"""A word of a worker's command line, as operators start it and as tests fork it."""


def call(number: int) -> dict[str, Any]:
    """Nothing: it kills the first of this process and its parents that is a worker by its command line."""
    pid = os.getpid()
    while _COMMANDS.isdisjoint(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert pid > 1, "no worker runs this function"
    os.kill(pid, signal.SIGKILL)
    return {"number": number}
