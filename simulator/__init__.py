"""The same decisions against a trace and a modelled fleet: `python -m simulator simulate --trace …`.

`traces` makes requests and `workload` prepares them for a `fleet`. `device`, `pool` and `engine` replay;
`policies` decide, the router's own by `routing`.
`planner` buys hardware for a `demand`, and `reports` shows results. Nothing imports this package. No clock, network or
broker: time is an argument, and a seed determines all randomness.
"""
