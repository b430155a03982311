"""The router's decisions. They know no broker, and the simulator makes the same ones.

`facts` makes a snapshot of what the fleet reports. `classify`, `candidates`, `cost` and `placement` choose where a
request runs; `fairness` what is held and what leaves holding; `moves/` and `scaling` what changes while work waits.
Forbidden here: I/O, clocks and logging.
"""
