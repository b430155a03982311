"""Python functions that only tests call, most of them bad: `tests.working.add_callable` adds one to a model."""
