"""llama.cpp's real server in a process of its own: `python -m tests.llama GGUF SLOTS` prints its address and serves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.settings import TREE

NAME = "smollm2"
"""What the server calls its model."""


def main(gguf: str, slots: int) -> None:
    """Serve the model until standard input ends."""
    from xllamacpp import CommonParams, Server

    parameters = CommonParams()
    parameters.model.path = gguf
    parameters.model_alias = {NAME}
    parameters.n_parallel = slots
    parameters.n_ctx = 1024 * slots
    parameters.cpuparams.n_threads = 1
    parameters.cpuparams_batch.n_threads = 1
    parameters.port = 0
    server = Server(parameters)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


@contextmanager
def llama_server(gguf: Path, slots: int) -> Iterator[str]:
    """The address of a server, as `http://127.0.0.1:…`."""
    command = [sys.executable, "-m", "tests.llama", str(gguf), str(slots)]
    with subprocess.Popen(
        command, cwd=TREE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:  # llama.cpp may log before it
                if line.startswith("http"):
                    yield line.strip()
                    break
            else:
                raise RuntimeError("llama.cpp's server ended before it served")
        finally:
            process.kill()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
