"""llama.cpp's real server of SmolLM2, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tasks.models.artefacts import ArtefactStore
from tasks.models.folder import load_catalogue
from tasks.settings import TREE, cache_directory

NAME = "smollm2"
"""What the server calls its model."""


def gguf() -> Path:
    """The model's file."""
    store, model = ArtefactStore(cache_directory(os.environ)), load_catalogue(TREE / "models").resolve("chat")
    return store.path(model, "weights")


@dataclass(frozen=True)
class LlamaServer:
    """A running server, and its address as `http://127.0.0.1:…`."""

    url: str
    process: subprocess.Popen[str]

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()


@contextmanager
def llama_server(slots: int) -> Iterator[str]:
    """The address of a server of SmolLM2, as `http://127.0.0.1:…`."""
    with llama_server_process(slots) as server:
        yield server.url


@contextmanager
def llama_server_process(slots: int) -> Iterator[LlamaServer]:
    """A server of SmolLM2."""
    options = ["--slots", str(slots), "--context", "1024", "--threads", "1", "--name", NAME]
    command = [sys.executable, "-m", "local.llama", str(gguf()), *options]
    with subprocess.Popen(command, cwd=TREE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:  # llama.cpp may log before it
                if line.startswith("http"):
                    yield LlamaServer(line.strip(), process)
                    break
            else:
                raise RuntimeError("llama.cpp's server ended before it served")
        finally:
            process.kill()
