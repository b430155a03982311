"""How a batch runs: one process drives one device.

`batcher` and `residency` decide. A message's way: `transport` and `consumer` fetch it, `strategy` checks its ticket,
`pool` takes it over, `intake` reads it, `loop` batches, claims and runs it on the `executor`, `finisher` and `backend`
end it; `pulse` says what the device does. `runtimes/` run graphs, `pipelines/` turn rows into tensors and back,
`architectures/` are the registered torch and JAX networks and `recipes/` convert weights, each in a process of its
own. Forbidden here: importing `router`.
"""
