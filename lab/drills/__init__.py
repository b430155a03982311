"""What becomes of jobs when a real fleet meets trouble: floods, reclaims, bursts, faults; one module a question."""
