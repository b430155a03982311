"""The router's decisions: functions from frozen values to values.

`classify`, `candidates`, `cost` and `placement` choose where a request runs; `fairness` what is held and what leaves
holding; `rebalance`, `retarget` and `scaling` what changes while work waits. Forbidden here: I/O,
clocks and logging.
"""
