"""llama.cpp's real server in a process of its own: `python -m tests.llama GGUF SLOTS` prints its address and serves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.settings import TREE, cache_directory

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
def llama_server(slots: int) -> Iterator[str]:
    """The address of a server of SmolLM2, as `http://127.0.0.1:…`."""
    store, model = ArtefactStore(cache_directory(os.environ)), load_catalogue(TREE / "models").resolve("chat")
    command = [sys.executable, "-m", "tests.llama", str(store.path(model, "weights")), str(slots)]
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
