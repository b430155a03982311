"""The stages of a job in a worker: fetch, admit, device and finish, with stream beside finish.

`queues` connects the stages, `job` defines what passes through them; `workers.worker` composes them. Forbidden here:
importing Celery; `job.CeleryWorker` is the interface to it.
"""
