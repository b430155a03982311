"""All that imports Celery: the pool that starts the worker, the consumer, the result backend and remote control.

`bridge` implements what the stages need of Celery, and `received` what they need of a job that Celery itself received.
"""
