"""Magnetisation against temperature: `python sweep.py ADDRESS` submits an array, and draws the answers.

Each temperature is a member that runs where there is room, and goes on from its last checkpoint if its worker or its
machine is lost. The curve is Onsager's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import taxiway

TEMPERATURES = [1.5 + 0.1 * step for step in range(21)]
CRITICAL = 2 / math.log(1 + math.sqrt(2))


def sweep(
    client: taxiway.Client, temperatures: Iterable[float], *, size: int = 64, sweeps: int = 10_000
) -> dict[float, float]:
    """The magnetisation at each temperature."""
    inputs = {
        temperature: {"size": size, "temperature": temperature, "sweeps": sweeps, "seed": seed}
        for seed, temperature in enumerate(temperatures)
    }
    return dict(zip(inputs, map(magnetisation_of, client.array("ising", inputs.values())), strict=True))


def magnetisation_of(outcome: taxiway.Result | taxiway.TaxiwayError) -> float:
    """The magnetisation in a member's result."""
    if isinstance(outcome, taxiway.TaxiwayError):
        raise outcome
    return float(outcome.outputs["magnetisation"])


def exact(temperature: float) -> float:
    """The magnetisation of an infinite lattice."""
    return (1 - math.sinh(2 / temperature) ** -4) ** (1 / 8) if temperature < CRITICAL else 0.0


def drawing(points: Mapping[float, float]) -> str:
    """An SVG picture of the points and of the exact curve."""
    low, high = min(points), max(points)

    def place(temperature: float, magnetisation: float) -> tuple[float, float]:
        return 40 + 540 * (temperature - low) / (high - low), 20 + 340 * (1 - magnetisation)

    steps = [low + (high - low) * step / 400 for step in range(401)]
    curve = " ".join("{:.1f},{:.1f}".format(*place(one, exact(one))) for one in steps)
    dots = "".join('<circle cx="{:.1f}" cy="{:.1f}" r="4"/>'.format(*place(*point)) for point in points.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 400" font-family="sans-serif" font-size="12">'
        f'<polyline points="{curve}" fill="none" stroke="#888"/>{dots}'
        '<path d="M40 20V360H580" fill="none" stroke="#000"/>'
        f'<text x="40" y="380">{low:g}</text><text x="560" y="380">{high:g}</text><text x="10" y="25">1</text>'
        '<text x="10" y="360">0</text><text x="250" y="395">temperature</text>'
        '<text x="45" y="15">magnetisation</text></svg>'
    )


def main(arguments: Sequence[str]) -> None:
    """Write ising.svg, and print the figures."""
    with taxiway.Client(arguments[0] if arguments else "http://127.0.0.1:8080") as client:
        points = sweep(client, TEMPERATURES)
    Path("ising.svg").write_text(drawing(points))
    for temperature, magnetisation in points.items():
        sys.stdout.write(f"{temperature:.1f}  {magnetisation:.4f}  exact {exact(temperature):.4f}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
