"""Child processes that never outlive their parent, however it ends (Linux).

Run as a script, this file asks the kernel for a signal on its parent's death and executes the given command. A
`preexec_fn` would do the same, but is not safe in a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1  # prctl(2)
_TAIL = 2000  # bytes


def start_child(
    command: Sequence[str],
    *,
    on_death: signal.Signals = signal.SIGKILL,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    output: int | None = None,
    errors: int | None = None,
    piped_input: bool = False,
    keep_open: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` in a process group of its own, out of reach of the terminal's Ctrl-C.

    The kernel ties it to the calling *thread*: call this from one that lives as long as the child should. It runs in
    `folder`. It receives `on_death` when the parent dies; `output` and `errors` are file descriptors or constants of
    `subprocess`; `keep_open` are file descriptors that it inherits.
    """
    bind = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), str(int(on_death))]
    return subprocess.Popen(
        [*bind, *command],
        stdin=subprocess.PIPE if piped_input else subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        env=environment,
        cwd=folder,
        start_new_session=True,
        pass_fds=tuple(keep_open),
    )


def stop_child(child: subprocess.Popen[bytes], *, timeout: float) -> bool:
    """Ask the child to end, and kill its group after `timeout` seconds; returns whether it ended when asked."""
    if child.poll() is None:
        child.terminate()
    return ends_within(child, timeout)


def ends_within(child: subprocess.Popen[bytes], timeout: float) -> bool:
    """Wait for a child that was asked to end, and kill its group after `timeout` seconds; returns whether it ended."""
    try:
        child.wait(timeout)
    except subprocess.TimeoutExpired:
        kill_group(child)
        child.wait()
        return False
    return True


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def open_log(log: Path) -> IO[bytes]:
    """A child's log, to append to; the null device where it cannot be written, for a child runs without a log too."""
    try:
        log.parent.mkdir(exist_ok=True)
        return log.open("ab")
    except OSError:
        return Path(os.devnull).open("ab")


def tail(log: Path) -> str:
    """The end of a child's log; empty if it cannot be read, because it was deleted, for example."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


def _become(parent: int, on_death: int, command: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, on_death) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
