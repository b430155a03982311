"""Runs Python callables in child processes, which can be killed during a call.

`child` is the worker's side, `callee` runs in the child process, and `channel` is between the two. Nothing here depends
on jobs, models or Celery.
"""
