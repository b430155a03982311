"""Crashes its process, like a fault in native code."""

from __future__ import annotations

import os
import signal


def call(number: int) -> dict[str, int]:
    """Nothing."""
    os.kill(os.getpid(), signal.SIGSEGV)
    return {"number": int(number)}
