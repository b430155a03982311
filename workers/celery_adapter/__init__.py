"""Everything that knows Celery: the pool, the consumer's strategy, the result backend and remote control."""
