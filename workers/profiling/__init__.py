"""Measures variants on this machine: `python -m workers.profiling`.

`fit` decides which batches are timed and fits the curve. `measure` times one variant in a process of its own.
`__main__` starts those processes, and `report` writes the profile files.
"""
