"""The tuner: plays recent arrivals in a simulation of the fleet, and finds the plan that serves them best."""
