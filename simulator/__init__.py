"""The same decisions against a trace and a modelled fleet: `python -m simulator simulate --trace … --fleet …`.

`traces` makes requests. `fleet` and `timing` model what devices take. `device`, `pool` and `engine` replay. `policies`
decide. `bounds` computes what no policy can undercut. `planner` buys hardware, and `reports` shows results. Nothing
imports this package. No clock, network or broker: time is an argument, and a seed determines all randomness.
"""
