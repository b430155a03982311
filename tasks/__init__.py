"""What the broker carries, and what the fleet agrees on.

Inside: queues.yaml (`topology`), the model catalogue (`catalogue`, `artefacts`), the Celery app, message
signing, the server-side scripts and the transports to Valkey and RabbitMQ. Forbidden here: deciding where
a request goes (`router`) and running one (`workers`).
"""
