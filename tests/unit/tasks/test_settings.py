from __future__ import annotations

from pathlib import Path

import pytest

from tasks.settings import SettingsError, cache_directory, on_socket, settings_from

SECRET = "00" * 32
REDIS = {"TAXIWAY_BROKER": "redis://:word@host/0", "TAXIWAY_SECRET": SECRET}


def test_the_broker_may_be_a_unix_socket() -> None:
    settings = settings_from(REDIS | {"TAXIWAY_BROKER": "unix://:word@/run/valkey.sock?db=1"})
    assert on_socket(settings.broker) == "redis+socket://:word@/run/valkey.sock?virtual_host=1"
    assert on_socket(REDIS["TAXIWAY_BROKER"]) == REDIS["TAXIWAY_BROKER"]


def test_an_address_of_a_state_store_is_refused_unless_it_is_the_brokers() -> None:
    assert settings_from(REDIS | {"TAXIWAY_STATE": REDIS["TAXIWAY_BROKER"]}) == settings_from(REDIS)
    own = settings_from(REDIS | {"TAXIWAY_BROKER": "rediss://host/0", "TAXIWAY_STATE": "rediss://host/0"})
    assert settings_from({"TAXIWAY_STATE": "rediss://host/0", **own.environment()}) == own
    with pytest.raises(SettingsError, match=r"TAXIWAY_STATE: expected none: .* unset it, got 'another address'"):
        settings_from(REDIS | {"TAXIWAY_STATE": "redis://:word@other/0"})


def test_a_child_process_reads_the_same_settings() -> None:
    settings = settings_from(REDIS | {"TAXIWAY_QUEUES": "/etc/queues.yaml", "TAXIWAY_CACHE": "/cache"})
    assert settings_from(settings.environment()) == settings


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("rediss://host/0", "rediss://host/0?ssl_cert_reqs=required"),
        ("rediss://host/0?ssl_ca_certs=ca.pem", "rediss://host/0?ssl_ca_certs=ca.pem&ssl_cert_reqs=required"),
        ("rediss://host/0?ssl_cert_reqs=required", "rediss://host/0?ssl_cert_reqs=required"),
        ("rediss+sentinel://a,b/0?service=f", "rediss+sentinel://a,b/0?service=f&ssl_cert_reqs=required"),
    ],
)
def test_under_tls_the_servers_certificate_is_verified(given: str, expected: str) -> None:
    settings = settings_from(REDIS | {"TAXIWAY_BROKER": given})
    assert settings.broker == expected
    assert settings_from(settings.environment()) == settings


def test_the_first_of_several_keys_is_the_one_that_signs() -> None:
    settings = settings_from(REDIS | {"TAXIWAY_SECRET": f"{'aa' * 16},{'bb' * 32}"})
    assert settings.secret == (b"\xaa" * 16, b"\xbb" * 32)
    assert settings_from(settings.environment()) == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TAXIWAY_BROKER": ""}, "TAXIWAY_BROKER: expected an address that starts with redis://"),
        ({"TAXIWAY_BROKER": "http://:word@host"}, "got 'http://…'"),
        ({"TAXIWAY_BROKER": "redis+sentinel://:word@host/0"}, "TAXIWAY_BROKER: expected ?service=NAME"),
        ({"TAXIWAY_BROKER": "word@host"}, "got 'another text'"),
        ({"TAXIWAY_BROKER": "amqp://:word@host"}, "(routers take a RabbitMQ's arrivals with TAXIWAY_AMQP), got 'amqp"),
        ({"TAXIWAY_SECRET": ""}, "TAXIWAY_SECRET: expected at least 32 hexadecimal digits"),
        ({"TAXIWAY_SECRET": "00" * 15}, "TAXIWAY_SECRET: expected at least 32 hexadecimal digits"),
        ({"TAXIWAY_SECRET": "word" * 16}, "TAXIWAY_SECRET: expected at least 32 hexadecimal digits"),
        ({"TAXIWAY_SECRET": f"{SECRET},"}, "TAXIWAY_SECRET: expected at least 32 hexadecimal digits"),
        ({"TAXIWAY_SECRET": f"{SECRET},{'00' * 15}"}, "TAXIWAY_SECRET: expected at least 32 hexadecimal digits"),
    ],
)
def test_a_wrong_setting_is_named_and_no_password_is_shown(changes: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_from(REDIS | changes)
    assert message in str(caught.value)
    assert "word" not in str(caught.value)


def test_weights_are_kept_in_the_users_cache_unless_another_folder_is_named() -> None:
    assert cache_directory({"XDG_CACHE_HOME": "/home/me/.cache"}) == Path("/home/me/.cache/taxiway")
    assert cache_directory({"TAXIWAY_CACHE": "/cache", "XDG_CACHE_HOME": "/x"}) == Path("/cache")
