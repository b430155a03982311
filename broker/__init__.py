"""Where work waits: arrivals, class queues and holding, on Valkey or RabbitMQ.

`port` and `mover` are the protocols that routers see; `valkey/` and `rabbitmq/` implement them. Forbidden here:
deciding where a request goes (`router`) and running one (`workers`).
"""
