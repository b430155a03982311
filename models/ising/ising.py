"""The two-dimensional Ising model by Metropolis' algorithm, on a square lattice with periodic boundaries.

A sweep tries each spin once, the black squares of a chessboard and then the white ones, which do not touch each other.
The exact magnetisation of an infinite lattice is Onsager's and Yang's: (1 - sinh(2 / T) ** -4) ** (1 / 8) below
T = 2.269, and 0 above (C. N. Yang, Phys. Rev. 85 (1952) 808).
"""

from __future__ import annotations

import math

import numpy as np

from taxiway import Run

SAVED_EVERY = 500  # sweeps: some tenths of a second of work, in a checkpoint of some kilobytes


def call(size: int, temperature: float, sweeps: int, seed: int, run: Run) -> dict[str, float]:
    """The mean absolute magnetisation per spin, and its standard deviation, over the second half of the sweeps.

    `size` is that of the lattice's side, even; `temperature` is in units of the coupling over Boltzmann's constant.
    Equal arguments give equal answers, whatever interrupts the run.
    """
    random = np.random.default_rng(int(seed))
    state = run.restored or {
        "sweep": 0,
        "spins": np.ones((int(size), int(size)), np.int8),
        "sums": np.zeros(2),
        "random": random.bit_generator.state,
    }
    spins, sums = state["spins"], state["sums"]
    random.bit_generator.state = state["random"]
    black = np.indices(spins.shape).sum(axis=0) % 2 == 0
    for sweep in range(state["sweep"], int(sweeps)):
        if sweep % SAVED_EVERY == 0 or run.should_yield:
            run.checkpoint({"sweep": sweep, "spins": spins, "sums": sums, "random": random.bit_generator.state})
        for squares in (black, ~black):
            _flip(spins, squares, float(temperature), random)
        magnetisation = abs(float(spins.mean()))
        if sweep >= sweeps // 2:
            sums += magnetisation, magnetisation**2
        run.report((sweep + 1) / sweeps, f"sweep {sweep + 1:,}", {"magnetisation": magnetisation})
    mean, square = sums / (int(sweeps) - int(sweeps) // 2)
    return {"magnetisation": float(mean), "deviation": math.sqrt(max(square - mean**2, 0.0))}


def _flip(spins: np.ndarray, squares: np.ndarray, temperature: float, random: np.random.Generator) -> None:
    """Try each of these spins once."""
    around = sum(np.roll(spins, shift, axis) for shift in (1, -1) for axis in (0, 1))
    cost = 2 * spins * around
    flips = squares & (random.random(spins.shape) < np.exp(np.minimum(0.0, -cost / temperature)))
    spins[flips] *= -1
