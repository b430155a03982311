"""How a batch runs: one process drives one device.

`batcher` and `residency` decide; `pool`, `consumer`, `heartbeat` and `app` do the I/O; `runtimes/` run graphs,
`pipelines/` turn rows into tensors and back, `architectures/` are the registered torch and JAX networks and
`recipes/` convert weights, each in a process of its own. Forbidden here: importing `router`.
"""
