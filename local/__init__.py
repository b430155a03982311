"""A whole fleet on one machine: `python -m local up|down|doctor|fetch|join`.

`plan` decides what to start on this machine; `supervisor` starts it, keeps it running and stops it. Routers and workers
are opaque here: each is a process with a command line, which prints a line on stdout when it is ready.
"""
