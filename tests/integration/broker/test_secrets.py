"""Servers that are away are named without their passwords."""

from __future__ import annotations

import asyncio

import pytest

from broker.valkey.queues import ValkeyTransport
from taxiway import Client, TaxiwayError
from taxiway.errors import BrokerUnavailableError

PASSWORD = "hush-hush"


def test_a_broker_that_is_away_is_named_without_its_password() -> None:
    async def take() -> None:
        transport = ValkeyTransport(f"redis://:{PASSWORD}@127.0.0.1:9/0", name="test", keep_record=1)
        try:
            await transport.take()
        finally:
            await transport.close()

    with pytest.raises(BrokerUnavailableError) as caught:
        asyncio.run(take())

    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "https", "redis", "rediss", "amqp", "ftp"])
def test_a_client_shows_its_address_without_the_password(scheme: str) -> None:
    address = f"{scheme}://me:{PASSWORD}@127.0.0.1:9"
    with pytest.raises(TaxiwayError) as caught, Client(address, connect_timeout=0.1) as client:
        client.submit("echo", "a")

    assert PASSWORD not in str(caught.value)
