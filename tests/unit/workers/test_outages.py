"""Which errors of Celery's follow-up tasks may pass, and which come again whenever the message does."""

import struct

import pytest
from celery.exceptions import BackendStoreError, NotRegistered
from kombu.exceptions import EncodeError, OperationalError, SerializerNotInstalled
from redis.exceptions import ResponseError, TimeoutError

from taxiway.errors import BrokerUnavailableError
from workers.celery_adapter.strategy import is_outage


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (BackendStoreError("failed to store result on the backend"), True),
        (BrokerUnavailableError("the state store does not answer"), True),
        (ConnectionResetError(), True),
        (OperationalError("connection refused"), True),
        (ResponseError("OOM command not allowed when used memory > 'maxmemory'"), True),
        (TimeoutError(), True),
        (EncodeError("an object is not JSON"), False),
        (NotRegistered("lab.failed"), False),
        (SerializerNotInstalled("No encoder installed for klingon"), False),
        (TypeError("'<' not supported between instances of 'str' and 'int'"), False),
        (struct.error("required argument is not an integer"), False),
    ],
)
def test_what_a_server_may_answer_otherwise_later_is_an_outage(error: Exception, outage: bool) -> None:
    assert is_outage(error) == outage
