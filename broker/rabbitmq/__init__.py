"""Arrivals and class queues on RabbitMQ; records and results stay in Valkey."""
