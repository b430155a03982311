"""Fault injection into a fleet under load, by a plan generated from a seed: `make chaos`.

`plan` and `workload` decide the faults and the jobs. `load` submits the jobs, `faults` injects the faults into the
`fleet`, and `history` keeps what producers observed. `checker` checks it and the state store against
docs/guarantees.md.
"""
