"""Servers that are away are named without their passwords."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.rabbitmq import RabbitTransport
from broker.valkey.queues import ValkeyTransport
from taxiway import Client, TaxiwayError
from taxiway.contract.keys import ARRIVALS
from taxiway.errors import BrokerUnavailableError

PASSWORD = "hush-hush"


@pytest.mark.parametrize("url", ["amqp://me:{}@127.0.0.1:9/", "redis://:{}@127.0.0.1:9/0"])
def test_a_broker_that_is_away_is_named_without_its_password(url: str) -> None:
    state = f"redis://:{PASSWORD}@127.0.0.1:9/0"
    named: dict[str, Any] = {"broker": url.format(PASSWORD), "state": state, "name": "test", "keep_record": 1}

    async def take() -> None:
        rabbit = url.startswith("amqp")
        transport = RabbitTransport(**named, queues=lambda: {ARRIVALS}) if rabbit else ValkeyTransport(**named)
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
