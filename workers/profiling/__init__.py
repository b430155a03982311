"""Measures how variants run on this machine: `python -m workers.profiling`.

`fit` and `grid` only decide. `samples` makes rows of a wanted size, `measure` times one variant in a process of its own
(`python -m workers.profiling.measure`), and `__main__` starts those processes and writes the profile files.
"""
