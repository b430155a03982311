"""Questions about decisions, answered by replays, programmes and drills: README.md has them, each with its command.

Nothing imports this package, and `make test` does not run it: `make lab` runs its tests.
"""
