import pytest

from broker.amqp import amqp_errors
from taxiway.errors import BrokerUnavailableError


@pytest.mark.parametrize("error", [Exception(), RuntimeError("<Connection> closed")])  # aiormq's ways to say so
def test_a_connection_that_ended_as_it_was_used_is_an_outage(error: Exception) -> None:
    with pytest.raises(BrokerUnavailableError), amqp_errors():
        raise error


@pytest.mark.parametrize("error", [KeyError("a job"), RuntimeError("ours")])
def test_an_error_of_ours_is_none(error: Exception) -> None:
    with pytest.raises(type(error)), amqp_errors():
        raise error
