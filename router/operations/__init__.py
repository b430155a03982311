"""What operators and callers ask of a running fleet: jobs, dead letters, the fleet view and metrics."""
