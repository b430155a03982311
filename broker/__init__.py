"""Where work waits: arrivals, class queues and holding, on Valkey or RabbitMQ.

`port` has the protocols that routers and workers see; `valkey/` and `rabbitmq` implement them. Forbidden here: deciding
where a request goes (`router`) and running one (`workers`).
"""
