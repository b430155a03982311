"""Does placement beat a good operator, by simulation? `python -m lab.trials`, its runs and targets."""
