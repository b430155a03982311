import pytest

import taxiway
from taxiway import errors
from taxiway.errors import InvalidRequestError


def test_every_name_that_is_promised_is_there_and_every_error_is_promised() -> None:
    assert [getattr(taxiway, name).__name__ for name in taxiway.__all__] == [*taxiway.__all__]
    tree = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert tree <= set(taxiway.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        taxiway.nothing  # noqa: B018


@pytest.mark.parametrize("url", ["amqp://localhost", "localhost:6379", "", "redis://localhost:port"])
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="url"):
        taxiway.Client(url)


@pytest.mark.parametrize("interface", ["redis://127.0.0.1:9", "http://127.0.0.1:9"])
def test_one_idempotency_key_for_a_map_is_refused(interface: str) -> None:
    with taxiway.Client(interface) as client, pytest.raises(InvalidRequestError, match="idempotency_key"):
        next(client.map("echo", [1, 2], idempotency_key="one"))


def test_what_only_a_router_knows_is_not_asked_of_a_broker() -> None:
    with taxiway.Client("redis://127.0.0.1:9") as client, pytest.raises(InvalidRequestError, match="http"):
        client.fleet()
