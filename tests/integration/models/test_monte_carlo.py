"""The model monte-carlo, whose callable runs in a process of its own."""

from __future__ import annotations

import math

from tests.unit.workers.pipelines.test_runtimes import answers


def test_monte_carlo_gives_equal_answers_to_equal_seeds_in_any_batch() -> None:
    rows = [{"samples": 20000, "seed": seed} for seed in (1, 2, 1, -5)]
    together = answers("monte-carlo", rows)
    assert together == answers("monte-carlo", *([row] for row in rows))
    assert together[0] == together[2]
    assert together[0] != together[1]


def test_monte_carlo_estimates_agree_within_their_standard_errors() -> None:
    first, second = answers("monte-carlo", [{"samples": 200_000, "seed": seed} for seed in (11, 12)])
    spread = math.hypot(first["standard-error"], second["standard-error"])
    assert abs(first["estimate"] - second["estimate"]) < 4 * spread
    # Without scattering exp(-4) = 1.8 % would pass; with it more do, and absorption keeps that far below a tenth.
    assert math.exp(-4) < first["estimate"] < 0.1
