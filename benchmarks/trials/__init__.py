"""Does placement beat a good operator, by simulation? `python -m benchmarks.trials`, its runs and targets."""
