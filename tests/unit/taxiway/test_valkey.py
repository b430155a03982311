import ssl
from typing import Any

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

import taxiway
from taxiway.errors import InvalidRequestError
from taxiway.valkey import LARGE, Address, AnswerParser, packed, parse
from tests.narrowing import present


@pytest.mark.cases("url, servers, fields")
def test_an_address_has_the_server_and_its_user(url: str, servers: list[Any], fields: dict[str, Any]) -> None:
    hosts = tuple(one if isinstance(one, str) else tuple(one) for one in servers)
    assert parse(url) == Address(hosts, **fields)


@pytest.mark.parametrize(
    "url", ["http://h", "redis+sentinel://h:26379/0", "redis://h:x", "redis://h/zero", "h:6379", "redis://a..b"]
)
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


def test_certificates_are_verified_unless_the_address_says_otherwise() -> None:
    verified = present(parse("rediss://h").context())
    assert (verified.verify_mode, verified.check_hostname) == (ssl.CERT_REQUIRED, True)
    by_any_name = present(parse("rediss://h?ssl_check_hostname=false").context())
    assert (by_any_name.verify_mode, by_any_name.check_hostname) == (ssl.CERT_REQUIRED, False)
    assert present(parse("rediss://h?ssl_cert_reqs=none").context()).verify_mode == ssl.CERT_NONE
    assert parse("redis://h").context() is None


LONG = bytes(range(256)) * (LARGE // 256) + b"x"


@given(st.lists(st.text() | st.binary() | st.integers() | st.just(LONG), min_size=1))
def test_a_command_is_packed_to_the_same_bytes_at_any_size(command: list[str | bytes | int]) -> None:
    assert b"".join(packed(command)) == hiredis.pack_command(tuple(command))  # type: ignore[arg-type]  # declared as a tuple of one


def test_a_large_value_is_sent_without_a_copy() -> None:
    view = memoryview(bytearray(LONG))
    assert any(isinstance(piece, memoryview) and piece.obj is view.obj for piece in packed(["SET", "k", view]))


answers = st.recursive(
    st.none() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=40) | st.sampled_from([b"v" * 1500, LONG]),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


def encoded(answer: object) -> bytes:
    """An answer as a server of RESP 2 sends it."""
    match answer:
        case None:
            return b"$-1\r\n"
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(answer), answer)
        case int():
            return b":%d\r\n" % answer
        case list():
            return b"*%d\r\n" % len(answer) + b"".join(map(encoded, answer))
    raise AssertionError(answer)


def plain(answer: object) -> object:
    return bytes(answer) if isinstance(answer, memoryview) else answer


@given(given=st.lists(answers, max_size=6), cuts=st.lists(st.integers(1, 2**17), min_size=1), small=st.booleans())
def test_answers_are_the_same_wherever_they_are_cut(given: list[object], cuts: list[int], small: bool) -> None:
    sent, reader, found = memoryview(b"".join(map(encoded, given))), AnswerParser(), []
    for number in range(len(sent) + len(cuts)):
        if not sent:
            break
        piece = min(cuts[number % len(cuts)] if not small else 1 + cuts[number % len(cuts)] % 9, len(sent))
        place = reader.buffer()
        count = min(piece, len(place))
        place[:count], sent = sent[:count], sent[count:]
        found += [plain(answer) for answer in reader.received(count)]
    assert found == given


@pytest.mark.parametrize("url", ["redis://a..b", "http://a..b", f"http://{'x' * 64}", "http://[::1", "redis://:p@[::1"])
def test_an_address_whose_host_no_resolver_takes_is_refused_by_the_client(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="url: expected "):
        taxiway.Client(url)
