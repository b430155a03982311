from __future__ import annotations

import ssl

import pytest

from taxiway.valkey import Address, parse
from tests.narrowing import present


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", Address((("h", 6379),))),
        ("redis://h:1/2", Address((("h", 1),), database=2)),
        ("redis://:p%2F%23@h/3?db=4", Address((("h", 6379),), database=3, password="p/#")),
        ("redis://u%40:p@[::1]:7", Address((("::1", 7),), username="u@", password="p")),
        (
            "unix://u:p@/run/valkey%20.sock?db=5",
            Address(("/run/valkey .sock",), database=5, username="u", password="p"),
        ),
        (
            "redis+sentinel://u:p@a:1,[::1],c/2?service=fleet&sentinel_username=w&sentinel_password=s",
            Address(
                (("a", 1), ("::1", 26379), ("c", 26379)),
                database=2,
                username="u",
                password="p",
                service="fleet",
                sentinel_username="w",
                sentinel_password="s",
            ),
        ),
        ("rediss://h/1?ssl_cert_reqs=none", Address((("h", 6379),), database=1, tls={"ssl_cert_reqs": "none"})),
    ],
)
def test_an_address_has_the_server_and_its_user(url: str, address: Address) -> None:
    assert parse(url) == address


@pytest.mark.parametrize("url", ["http://h", "redis+sentinel://h:26379/0", "redis://h:x", "redis://h/zero", "h:6379"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse(url)


def test_a_connection_begins_with_its_account_and_its_database() -> None:
    assert parse("redis://h").greeting == []
    assert parse("redis://:p@h/2").greeting == [("AUTH", "p"), ("SELECT", 2)]
    assert parse("redis://u:p@h").greeting == [("AUTH", "u", "p")]


def test_a_server_named_as_primary_must_be_one() -> None:
    address = parse("redis+sentinel://h?service=fleet")
    assert address.greeting == [("HELLO", 2)]
    address.check_greeting([[b"proto", 2, b"role", b"master"]])
    with pytest.raises(ConnectionError, match="'fleet'"):
        address.check_greeting([[b"proto", 2, b"role", b"replica"]])
    assert address.primary_of([b"h", b"7"]) == ("h", 7)
    with pytest.raises(ConnectionError, match="'fleet'"):
        address.primary_of(None)


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(parse("redis://u:secret@h"))


def test_certificates_are_verified_unless_the_address_says_otherwise() -> None:
    verified = present(parse("rediss://h").context())
    assert (verified.verify_mode, verified.check_hostname) == (ssl.CERT_REQUIRED, True)
    by_any_name = present(parse("rediss://h?ssl_check_hostname=false").context())
    assert (by_any_name.verify_mode, by_any_name.check_hostname) == (ssl.CERT_REQUIRED, False)
    assert present(parse("rediss://h?ssl_cert_reqs=none").context()).verify_mode == ssl.CERT_NONE
    assert parse("redis://h").context() is None
