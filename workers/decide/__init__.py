"""A worker's decisions: pure functions of frozen values. Forbidden here: I/O, clocks and logging."""
