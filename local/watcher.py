"""The Celery app for tools that only observe a fleet: `celery -A local.watcher flower`, `… inspect`, `… events`.

Celery imports it by name, so it reads the environment on import.
"""

from __future__ import annotations

import os

from tasks.celery_app import make_app
from tasks.settings import settings_from
from tasks.topology import load_topology

_settings = settings_from(os.environ)
app = make_app(_settings, load_topology(_settings.queues))
