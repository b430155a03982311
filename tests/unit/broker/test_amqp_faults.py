import pytest

from broker.amqp import amqp_errors
from taxiway.errors import BrokerUnavailableError


def test_a_connection_that_ended_as_it_was_written_to_is_an_outage() -> None:
    with pytest.raises(BrokerUnavailableError), amqp_errors():
        raise Exception  # aiormq's way to say so


def test_an_error_of_ours_is_none() -> None:
    with pytest.raises(KeyError), amqp_errors():
        raise KeyError("a job")
