"""The worker: one process drives one device and runs its batches.

`worker` composes the stages in `stages/`; `decide/` holds their decisions. `executor` loads variants and runs batches.
`heartbeat` publishes the device's state and renews claims. `celery_adapter/` runs the worker inside a Celery worker;
only it imports Celery. `runtimes/` run models and `pipelines/` convert rows to tensors and back, as `port` says;
`architectures/` and `recipes/` are networks and weight conversions that several models share. Forbidden here: importing
`router`.
"""
