"""Walks from a number and back to it, with a checkpoint every few steps: a step that is lost or repeated shows."""

from __future__ import annotations

from taxiway import Run

STEPS, SAVED_EVERY = 120, 10
_FACTOR, _MODULUS = 48271, 2**61 - 1
_BACK = pow(_FACTOR, -STEPS, _MODULUS)


def call(number: int, run: Run) -> dict[str, int]:
    """The given number, and how often the run went on from a checkpoint, and yielded."""
    state = run.restored or {"step": 0, "place": int(number), "resumed": -1, "yielded": 0}
    place, resumed, yielded = state["place"], state["resumed"] + 1, state["yielded"]
    for step in range(state["step"], STEPS):
        if (asked := run.should_yield) or step % SAVED_EVERY == 0:
            run.checkpoint({"step": step, "place": place, "resumed": resumed, "yielded": yielded + asked})
        place = place * _FACTOR % _MODULUS
        _work()
        run.report((step + 1) / STEPS)
    return {"number": place * _BACK % _MODULUS, "resumed": resumed, "yielded": yielded}


def _work() -> None:
    """Some milliseconds of it."""
    sum(range(250_000))
