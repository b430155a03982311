"""Queues, holding and job records on Valkey or Redis: server-side scripts, and the connections that run them."""
