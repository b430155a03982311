"""Our own connections to Valkey or Redis: `aio` and `blocking` connect to an `address` without hidden retries.

A connection that fails raises `OSError` (`TimeoutError` and `ConnectionError` are such); a server that answers with an
error raises `ServerError`. Celery and kombu have connections of their own.
"""
