"""The same decisions against a trace and a modelled fleet: `python -m simulator simulate --trace … --fleet …`.

`traces`, `synthetic` and `workload` make requests; `fleet` and `timing` say what devices would take; `device`, `pool`
and `engine` replay; `policies` decide; `bound` says what nobody can undercut; `report` and `chart` show it. Nothing
imports this package. No clock, no network and no broker: time is an argument, and a seed decides all chance.
"""
