"""A least-squares fit by JAX: frequency, damping, amplitude and phase of a noisy, decaying oscillation.

The same program runs on a CPU and on an accelerator, and its state is a few small arrays: its checkpoints are portable,
so a fit that began on a CPU may end on a TPU. The steps are Adam's (Kingma and Ba 2015).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from taxiway import Run

TRUE = np.array([5.0, 0.3, 1.2, 0.4])  # radians a second, 1/s, amplitude, radians
RATE, DECAYS, TINY = 0.005, (0.9, 0.999), 1e-8
TOGETHER = 50  # steps between two reports


def call(steps: int, noise: float, seed: int, run: Run) -> dict[str, float]:
    """What is found from 2,000 samples over 8 s, with normal noise of this deviation, after so many steps."""
    times = jnp.linspace(0.0, 8.0, 2000)
    random = np.random.default_rng(int(seed))
    samples = _oscillation(TRUE, times) + float(noise) * random.normal(size=times.shape)
    start = {"step": 0, "found": TRUE * [0.95, 0.5, 0.5, 0.0], "mean": np.zeros(4), "square": np.zeros(4)}
    state = run.restored or start
    while state["step"] < steps:
        if run.should_yield or state["step"] % (20 * TOGETHER) == 0:
            run.checkpoint(state)
        count = min(TOGETHER, int(steps) - state["step"])
        *arrays, loss = _advance(count, state["step"], state["found"], state["mean"], state["square"], times, samples)
        found, mean, square = map(np.asarray, arrays)
        state = {"step": state["step"] + count, "found": found, "mean": mean, "square": square}
        run.report(state["step"] / steps, f"mean square {float(loss):.4f}", {"frequency": found[0]})
    names = ("frequency", "damping", "amplitude", "phase")
    return {name: float(value) for name, value in zip(names, state["found"], strict=True)}


def _oscillation(parameters: jax.Array | np.ndarray, times: jax.Array) -> jax.Array:
    frequency, damping, amplitude, phase = parameters
    return amplitude * jnp.exp(-damping * times) * jnp.cos(frequency * times + phase)


@jax.jit
def _advance(
    count: int, step: int, found: jax.Array, mean: jax.Array, square: jax.Array, times: jax.Array, samples: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The parameters and both moments after so many steps, and the mean square of what remains."""
    loss = jax.value_and_grad(lambda parameters: jnp.mean((_oscillation(parameters, times) - samples) ** 2))

    def adam(index: int, now: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found, mean, square, _ = now
        value, slope = loss(found)
        mean = DECAYS[0] * mean + (1 - DECAYS[0]) * slope
        square = DECAYS[1] * square + (1 - DECAYS[1]) * slope**2
        power = step + index + 1
        first, second = mean / (1 - DECAYS[0] ** power), square / (1 - DECAYS[1] ** power)
        return found - RATE * first / (jnp.sqrt(second) + TINY), mean, square, value

    now = (*(jnp.asarray(one, jnp.float32) for one in (found, mean, square)), jnp.float32(0))
    return jax.lax.fori_loop(0, count, adam, now)
