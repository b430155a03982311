from __future__ import annotations

from hypothesis import HealthCheck, settings

# No deadline: a busy machine is no failure, and pytest-timeout ends what hangs. Nor is a draw of many situations that
# have no placement: those tests leave them out on purpose.
settings.register_profile(
    "unit", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)
settings.load_profile("unit")
