"""How a batch runs: one process drives one device.

`worker` composes the stages of `stages/`, `decide/` has their decisions, `executor` the variants that the device has
loaded; `heartbeat` publishes what the device does, and renews what is held. `celery_adapter/` runs the worker inside a
Celery worker, and alone imports Celery. `runtimes/` run graphs, `pipelines/` turn rows into tensors and back,
`architectures/` and `recipes/` are the networks and the conversions of weights that several models share. Forbidden
here: importing `router`.
"""
