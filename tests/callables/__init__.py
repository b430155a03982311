"""Python functions that only tests call, most of them bad. `python -m tests.callables` is a worker that finds them."""
