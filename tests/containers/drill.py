"""Submits jobs to a router and reads every answer: `drill.py URL COUNT`, with the key in TAXIWAY_KEY."""

from __future__ import annotations

import os
import sys

import taxiway

TIMEOUT = 120.0
"""Seconds for one answer."""

SWEEPS = 500
"""Of a job: some tens of milliseconds of a core, so that many wait when a worker is drained."""


def main(url: str, count: int) -> None:
    """Submit `count` jobs; say so when all are accepted, and when all are answered."""
    with taxiway.Client(url, key=os.environ["TAXIWAY_KEY"]) as client:
        inputs = [{"size": 16, "temperature": 2.0, "sweeps": SWEEPS, "seed": seed} for seed in range(count)]
        jobs = [client.submit("ising", one, deadline=TIMEOUT) for one in inputs]
        sys.stdout.write(f"{count} jobs accepted\n")
        sys.stdout.flush()
        answers = [job.result(timeout=TIMEOUT) for job in jobs]
    assert all(0 < answer.outputs["magnetisation"] < 1 for answer in answers)
    sys.stdout.write(f"{len(answers)} jobs answered\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
