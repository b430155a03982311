"""Where work waits: arrivals, class queues and holding, on Valkey or Redis.

`port` has the values that routers and workers exchange with it, `valkey/` the connections and scripts, `amqp` the
bridge to a RabbitMQ. Forbidden here:
deciding where a request goes (`router`) and running one (`workers`).
"""
