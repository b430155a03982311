"""What starting a process does not pay for."""

import subprocess
import sys

import pytest

from tasks.settings import TREE

SLOW = {
    "api.__main__": {"aio_pika", "celery", "httpx", "huggingface_hub", "kombu", "redis", "scipy"},
    "router.router": {"litestar", "uvicorn", "h11", "prometheus_client"},
    "simulator.__main__": {"aiohttp", "celery", "httpx", "huggingface_hub", "redis", "scipy"},
    "workers.worker": {"aiohttp", "celery", "httpx", "huggingface_hub", "prometheus_client", "scipy"},
}
"""Libraries that each takes 30 ms to 300 ms to import, and that only some of a program's processes ever use."""


@pytest.mark.parametrize("module", SLOW)
def test_a_program_does_not_import_what_most_of_its_processes_never_use(module: str) -> None:
    command = [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=TREE)

    assert SLOW[module] & set(done.stdout.split()) == set()
