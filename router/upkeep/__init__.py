"""Periodic duties of the fleet: moving, releasing, retargeting, and ending jobs at their deadline."""
