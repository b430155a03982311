"""The four stages of a job in a worker, fetch, admit, device and finish, and the stream of answers beside the last.

`queues` has what lies between them, `job` what passes through; `workers.worker` composes them. Forbidden here: to
import Celery, which `ports` stands for.
"""
