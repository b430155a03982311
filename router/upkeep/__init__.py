"""Periodic work for the fleet: the leader's duties, and ending jobs at their deadline."""
