"""How much of a machine does a queue cost? Contestants, workloads and load of `python -m benchmarks.suite`."""
