"""How a batch runs: one process drives one device.

`worker` composes the stages of `stages/`, `decide/` has their decisions, `executor` the variants that the device has
loaded; `heartbeat` publishes what the device does, and renews what is held. `celery_adapter/` runs the worker inside a
Celery worker, and alone imports Celery. `runtimes/` run graphs, `pipelines/` turn rows into tensors and back,
`architectures/` are the registered torch and JAX networks and `recipes/` convert weights, each in a process of its own.
Forbidden here: importing `router`.
"""
