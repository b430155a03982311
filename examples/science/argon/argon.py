"""Liquid argon by OpenMM: 216 atoms with Lennard-Jones forces in a periodic box, under a Langevin thermostat.

OpenMM's checkpoint has the random numbers' stream, which its serialised `State` lacks; it is valid on the same platform
and kind of machine only, so it is not portable. On the platform Reference a run that was interrupted ends with the same
bytes as one that was not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openmm
from openmm import unit

from taxiway import Run

ATOMS_A_SIDE = 6
SPACING = 0.38  # nm: liquid argon's density
SIGMA, EPSILON, MASS = 0.3405, 0.9961, 39.948  # nm, kJ/mol, u: Rowley, Nicholson and Parsonage 1975
STEP = 0.004  # ps
TOGETHER = 100  # steps between two reports
SAVED_EVERY = 1000  # steps


def call(steps: int, temperature: float, seed: int, run: Run) -> dict[str, Any]:
    """The potential energy after so many steps, in kJ/mol, and the atoms' positions in nm."""
    context = _context(float(temperature), int(seed))
    done = 0
    if run.restored is not None:
        done = run.restored["step"]
        context.loadCheckpoint(run.restored["context"])
    while done < steps:
        if done % SAVED_EVERY == 0 or run.should_yield:
            run.checkpoint({"step": done, "context": context.createCheckpoint()}, portable=False)
        context.getIntegrator().step(min(TOGETHER, int(steps) - done))
        done = min(done + TOGETHER, int(steps))
        run.report(done / steps, f"{done * STEP:.1f} ps")
    state = context.getState(getEnergy=True, getPositions=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return {"energy": float(energy), "positions": np.asarray(positions)}


def _context(temperature: float, seed: int) -> openmm.Context:
    """The atoms on a lattice, with velocities of this temperature (K)."""
    side = ATOMS_A_SIDE * SPACING
    system, force = openmm.System(), openmm.NonbondedForce()
    system.setDefaultPeriodicBoxVectors(*(side * np.eye(3)))
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(side / 2)
    for _ in range(ATOMS_A_SIDE**3):
        system.addParticle(MASS)
        force.addParticle(0.0, SIGMA, EPSILON)
    system.addForce(force)
    integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, STEP)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(SPACING * np.indices((ATOMS_A_SIDE,) * 3).reshape(3, -1).T)
    context.setVelocitiesToTemperature(temperature, seed)
    return context
