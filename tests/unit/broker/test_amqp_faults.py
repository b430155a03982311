import pytest

from broker.amqp import amqp_errors
from taxiway.errors import BrokerUnavailableError

ENDED = Exception(), RuntimeError("<Connection> closed")  # aiormq's ways to say so


@pytest.mark.parametrize("error", [*ENDED, KeyError("a job"), RuntimeError("ours")])
def test_a_connection_that_ended_as_it_was_used_is_an_outage_and_an_error_of_ours_none(error: Exception) -> None:
    with pytest.raises(BrokerUnavailableError if error in ENDED else type(error)), amqp_errors():
        raise error
