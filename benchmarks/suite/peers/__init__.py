"""The peers' servers, one small file each, run by the peer's own interpreter in a virtual environment of its own.

Each serves the plan in its environment with `benchmarks.suite.batch_loop`, in the way that its documentation shows.
"""
