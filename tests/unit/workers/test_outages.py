"""Which errors of Celery's follow-up tasks may pass, and which come again whenever the message does."""

import struct

import pytest
from celery.exceptions import BackendStoreError, NotRegistered
from kombu.exceptions import EncodeError, OperationalError, SerializerNotInstalled
from redis.exceptions import ResponseError, TimeoutError

from taxiway.errors import BrokerUnavailableError
from workers.celery_adapter.strategy import is_outage


@pytest.mark.parametrize(
    "error",
    [
        BackendStoreError("failed to store result on the backend"),
        BrokerUnavailableError("the state store does not answer"),
        ConnectionResetError(),
        OperationalError("connection refused"),
        ResponseError("OOM command not allowed when used memory > 'maxmemory'"),
        TimeoutError(),
    ],
)
def test_what_a_server_may_answer_otherwise_later_is_an_outage(error: Exception) -> None:
    assert is_outage(error)


@pytest.mark.parametrize(
    "error",
    [
        EncodeError("an object is not JSON"),
        NotRegistered("lab.failed"),
        SerializerNotInstalled("No encoder installed for klingon"),
        TypeError("'<' not supported between instances of 'str' and 'int'"),
        struct.error("required argument is not an integer"),
    ],
)
def test_a_signature_that_no_server_takes_is_no_outage(error: Exception) -> None:
    assert not is_outage(error)
