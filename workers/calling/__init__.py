"""Runs Python callables in child processes, which can be killed during a call.

`child` is the worker's side, `callee` runs in the child process, `channel` is between the two, and `keeper` kills the
children of a worker that was killed. Nothing here depends on jobs, models or Celery.
"""
