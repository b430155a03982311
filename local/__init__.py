"""A whole fleet on one machine: `python -m local up|down|doctor|fetch|demo`.

`plan` decides what to start from what the machine has; `supervisor` starts it, keeps it up and stops it. Nothing here
knows how a router or a worker is made: each is a process with a command line, and a line on stdout when it is ready.
"""
