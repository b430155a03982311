"""Python functions that only the fault suite's models call, good ones and bad ones. See `tests.chaos.worker`."""
