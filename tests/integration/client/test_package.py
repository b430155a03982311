"""What importing the client takes and costs, in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_importing_taxiway_imports_none_of_its_libraries() -> None:
    libraries = ("redis", "aiohttp", "click", "rich", "msgspec")
    code = f"import sys, taxiway; print([m for m in {libraries} if m in sys.modules])"

    assert run(code).strip() == "[]"


def test_importing_taxiway_costs_less_than_150_milliseconds() -> None:
    assert min(seconds("import taxiway") for _ in range(5)) < 0.15


def seconds(code: str) -> float:
    """Processor time, which other processes do not change much."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_valkey_client_needs_no_aiohttp_and_the_http_api_no_hiredis() -> None:
    code = "import sys, taxiway; taxiway.Client({!r}).close(); print(*(name in sys.modules for name in {}))"
    libraries = ("aiohttp", "hiredis", "redis")

    assert run(code.format("redis://127.0.0.1:9", libraries)).split() == ["False", "True", "False"]
    assert run(code.format("http://127.0.0.1:9", libraries)).split() == ["True", "False", "False"]
