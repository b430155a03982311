"""What a router knows of its state store before it has answered."""

import pytest

from router.service.store import RouterStore
from tasks.queues.limits import Limits
from taxiway.errors import BrokerUnavailableError


def test_nothing_is_accepted_before_the_stores_time_is_known() -> None:
    with pytest.raises(BrokerUnavailableError, match="is not known yet"):
        RouterStore("redis://127.0.0.1:1/0", Limits()).clock.stored_now()
