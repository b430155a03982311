"""A router as the HTTP API has it: what callers submit and wait for, what operators load, and what workers counted."""
