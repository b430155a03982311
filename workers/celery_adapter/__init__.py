"""All that imports Celery: the pool that starts the worker, the consumer, the result backend and remote control.

`strategy` says which messages Celery runs and how their results are stored, `consumer` is what a worker adds to
Celery's consumer, and `pool` implements what the stages need of Celery and of a job that Celery itself received.
"""
