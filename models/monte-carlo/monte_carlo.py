"""The share of neutrons that pass through a slab, by Monte-Carlo: a small job of the kind that labs run in thousands.

Each neutron enters a slab four mean free paths thick at a right angle. It flies an exponentially distributed way, is
absorbed with probability 0.3, and else flies on in a direction drawn evenly from the sphere, until it is absorbed
or leaves. One speed, isotropic scattering: the textbook slab (Lewis and Miller 1984, chapter 7).
"""

from __future__ import annotations

import math

import numpy as np

THICKNESS = 4.0  # mean free paths
ABSORPTION = 0.3  # probability at a collision
_CHUNK = 2**17  # neutrons at once: 4 MB of state


def call(samples: int, seed: int) -> dict[str, float]:
    """The estimated share and its standard error; equal arguments give equal answers.

    Args:
        samples: neutrons, at least 1.
        seed: any 64-bit integer.
    """
    random = np.random.Generator(np.random.PCG64(int(seed) % 2**64))
    left = int(samples)
    passed = 0
    while left > 0:
        passed += _transmitted(random, min(left, _CHUNK))
        left -= _CHUNK
    share = passed / int(samples)
    return {"estimate": share, "standard-error": math.sqrt(share * (1 - share) / int(samples))}


def _transmitted(random: np.random.Generator, neutrons: int) -> int:
    depth = np.zeros(neutrons)
    direction = np.ones(neutrons)
    passed = 0
    while depth.size:
        depth = depth + direction * random.exponential(size=depth.size)
        passed += int((depth >= THICKNESS).sum())
        on = (depth > 0) & (depth < THICKNESS) & (random.random(depth.size) >= ABSORPTION)
        depth = depth[on]
        direction = random.uniform(-1, 1, size=depth.size)
    return passed
