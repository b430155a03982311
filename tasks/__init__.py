"""What the fleet agrees on.

Inside: queues.yaml (`topology`, its parts in `queues`), the models (`models`), the Celery app, settings, tickets,
heartbeats, logs and traces.
Forbidden here: deciding where a request goes (`router`) and running one (`workers`).
"""
