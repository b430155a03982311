"""Does what its input names: one good deed, and every misbehaviour of a callable."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from taxiway.errors import InvalidRequestError

_KEPT: list[np.ndarray] = []
_ORPHAN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"


class _Evil(Exception):
    def __str__(self) -> str:
        raise ValueError("no text either")


def call(deed: str, number: int) -> dict[str, Any]:
    """What comes of the deed. `pid`, where it is asked for, is that of the process."""
    return {"given": _DEEDS[deed](int(number))}


def _echo(number: int) -> Any:
    return number


def _note(pid: int) -> None:
    """Add a process to the file that `TAXIWAY_NOTED` names."""
    with Path(os.environ["TAXIWAY_NOTED"]).open("a") as notes:
        notes.write(f"{pid}\n")


def _sleep(seconds: int) -> Any:
    _note(os.getpid())
    time.sleep(seconds)


def _spin(seconds: int) -> Any:
    _note(os.getpid())
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def _stubborn(seconds: int) -> Any:
    """Sleep beside a process that ignores SIGTERM, and ignore it, too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    orphan = subprocess.Popen([sys.executable, "-c", _ORPHAN], stdout=subprocess.PIPE)
    assert orphan.stdout is not None
    orphan.stdout.readline()
    _note(orphan.pid)
    _sleep(seconds)


def _fork(number: int) -> Any:
    """Come back twice."""
    os.fork()
    return number


def _crash(_: int) -> Any:
    ctypes.string_at(0)


def _hold(mebibytes: int) -> Any:
    _KEPT.append(np.ones(mebibytes * 2**20, np.uint8))
    time.sleep(0.06)  # two looks at what it holds
    return len(_KEPT)


def _hold_in_a_child(mebibytes: int) -> Any:
    code = f"import time; held = b'1' * {mebibytes * 2**20}; time.sleep(60)"
    subprocess.run([sys.executable, "-c", code], check=True)


def _raise(error: BaseException) -> Callable[[int], Any]:
    def act(_: int) -> Any:
        raise error

    return act


def _recurse(number: int) -> Any:
    return _recurse(number + 1) + 1


def _nest(levels: int) -> Any:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def _loop(_: int) -> Any:
    value: list[Any] = []
    value.append(value)
    return {"itself": value}


def _print(_: int) -> Any:
    sys.stdout.write("\ud800 printed\n")
    sys.stderr.write('{"ready": "worker", "worker": "not me"}\n')
    return 1


_DEEDS: dict[str, Callable[[int], Any]] = {
    "echo": _echo,
    "pid": lambda _: os.getpid(),
    "sleep": _sleep,
    "spin": _spin,
    "stubborn": _stubborn,
    "fork": _fork,
    "crash": _crash,
    "leave": os._exit,
    "hold": _hold,
    "hold in a child": _hold_in_a_child,
    "no memory": _raise(MemoryError("as numpy says")),
    "exit": _raise(SystemExit(3)),
    "interrupt": _raise(KeyboardInterrupt()),
    "close": _raise(GeneratorExit()),
    "evil": _raise(_Evil()),
    "surrogate": _raise(ValueError("a \ud800 surrogate")),
    "long": _raise(ValueError("x" * 10_000_000)),
    "refuse": _raise(InvalidRequestError("not this number", field="inputs.number")),
    "recurse": _recurse,
    "print": _print,
    "nest": _nest,
    "loop": _loop,
    "object": lambda _: object(),
    "text": lambda _: "a \ud800 surrogate",
    "huge": lambda _: 2**70,
    "large": lambda size: np.arange(size),
    "ragged": lambda _: [1, [2]],
    "mapping": lambda _: {"a": [1, None, b"\xff", np.float32(0.5), np.arange(3)]},
    "secrets": lambda _: sorted(name for name in os.environ if "SECRET" in name or "BROKER" in name),
}
