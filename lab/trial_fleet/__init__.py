"""Does the plan of a real fleet beat a good operator's configuration? `python -m lab.trial_fleet`."""
