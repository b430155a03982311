from __future__ import annotations

from hypothesis import settings

# No deadline: a busy machine is no failure, and pytest-timeout ends what hangs.
settings.register_profile("unit", deadline=None, max_examples=50)
settings.load_profile("unit")
