"""Small jobs of a line that carries a large body, too: they do not wait until it has passed."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.routing import eventually
from tests.sites import FAR, NEAR, PEER, two_sites

QUICK = {"samples": [4], "seed": [3]}
BODY = 8 * 2**20
RATE = 4 * 2**20
"""Bytes a second of the line, each way."""


def test_small_jobs_do_not_wait_for_a_large_body_on_the_line(valkey_url: str, tmp_path: Path) -> None:
    limits = f"limits: {{lease: 60, payload: {BODY + 2**20}, bodies: {3 * BODY}}}"
    far, near = (queues.replace("limits: {lease: 3}", limits) for queues in (FAR, NEAR))
    with two_sites(valkey_url, tmp_path / "sites", far=far, queues=near) as sites:
        sites.line.rate = RATE
        began, taken = time.monotonic(), []
        with ThreadPoolExecutor() as threads:
            large = threads.submit(sites.near.client.infer, "echo", {"payload": ["x" * BODY]}, timeout=120)
            while not large.done():
                sent = time.monotonic()
                assert sites.near.client.infer("slab", QUICK, timeout=60).report.hardware_class == PEER
                taken.append(time.monotonic() - sent)
        passed = time.monotonic() - began
        assert large.result().report.hardware_class == PEER
        assert passed > 2 * BODY / RATE
        eventually(lambda: RATE / 4 < sites.facts().bytes_per_second < 2 * RATE)
        assert statistics.median(taken) < passed / 10
