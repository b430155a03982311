"""Which worker configuration a Celery app has: the pool, the backend and the bootsteps read it from the app."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from celery import Celery

from workers.context import WorkerContext

_contexts: WeakKeyDictionary[Celery, WorkerContext] = WeakKeyDictionary()


def bind_context(app: Celery, context: WorkerContext) -> None:
    """Give the app its configuration."""
    _contexts[app] = context


def context_of(app: Celery) -> WorkerContext:
    """The configuration that the app was given."""
    return _contexts[app]
