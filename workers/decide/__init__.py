"""A worker's decisions: functions from frozen values to values. Forbidden here: I/O, clocks and logging."""
