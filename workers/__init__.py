"""How a batch runs: one process drives one device.

`batcher` and `residency` decide. A message's way: the `fetcher` takes and claims it (`transport`), `intake` reads it,
`reception` admits it, `loop` batches and runs it on the `executor` once `loads` has its variant loaded, the `finisher`
ends it, and the `ledger` tells Celery's tools of it. What needs Celery itself, and all from RabbitMQ, goes by its
consumer: `strategy` checks its ticket, `pool` takes it over, `backend` ends it. `pulse` says what the device does, and
keeps what is held. `runtimes/` run graphs, `pipelines/` turn rows into tensors and back, `architectures/` are the
registered torch and JAX networks and `recipes/` convert weights, each in a process of its own. Forbidden here:
importing `router`.
"""
