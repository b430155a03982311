"""What a machine has, as its control group says."""

from pathlib import Path

import pytest
from celery.app.utils import Settings

from tasks.celery_app import make_app
from tasks.machine import memory_of_container
from tasks.settings import SettingsError, on_socket, settings_from
from tasks.topology import load_topology

SECRET = "00" * 32
REDIS = {"TAXIWAY_BROKER": "redis://:word@host/0", "TAXIWAY_SECRET": SECRET}


def test_an_address_of_a_state_store_is_refused_unless_it_is_the_brokers() -> None:
    assert settings_from(REDIS | {"TAXIWAY_STATE": REDIS["TAXIWAY_BROKER"]}) == settings_from(REDIS)
    own = settings_from(REDIS | {"TAXIWAY_BROKER": "rediss://host/0", "TAXIWAY_STATE": "rediss://host/0"})
    assert settings_from({"TAXIWAY_STATE": "rediss://host/0", **own.environment()}) == own
    with pytest.raises(SettingsError, match=r"TAXIWAY_STATE: expected none: .* unset it, got 'another address'"):
        settings_from(REDIS | {"TAXIWAY_STATE": "redis://:word@other/0"})


@pytest.mark.cases("given, expected")
def test_under_tls_the_servers_certificate_is_verified(given: str, expected: str) -> None:
    settings = settings_from(REDIS | {"TAXIWAY_BROKER": given})
    assert settings.broker == expected
    assert settings_from(settings.environment()) == settings


def test_the_first_of_several_keys_is_the_one_that_signs() -> None:
    settings = settings_from(REDIS | {"TAXIWAY_SECRET": f"{'aa' * 16},{'bb' * 32}"})
    assert settings.secret == (b"\xaa" * 16, b"\xbb" * 32)
    assert settings_from(settings.environment()) == settings


@pytest.mark.cases("changes, message")
def test_a_wrong_setting_is_named_and_no_password_is_shown(changes: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_from(REDIS | changes)
    assert message in str(caught.value)
    assert "word" not in str(caught.value)


SENTINELS = "redis+sentinel://u:p%2F@a:1,b/2?service=fleet&sentinel_password=s"


def app_of(url: str) -> Settings:
    settings = settings_from({"TAXIWAY_BROKER": url, "TAXIWAY_SECRET": "00" * 32})
    return make_app(settings, load_topology(settings.queues), backend="module:Backend").conf


def test_celery_gets_a_unix_socket_in_its_own_form() -> None:
    assert on_socket(REDIS["TAXIWAY_BROKER"]) == REDIS["TAXIWAY_BROKER"], "which is none"
    conf = app_of("unix://u:p%2F@/run/my%20fleet/valkey.sock?db=3")
    address = "socket://u:p%2F@/run/my%20fleet/valkey.sock?virtual_host=3"
    assert conf.broker_url == f"redis+{address}"
    assert conf.result_backend == f"module:Backend+{address}"


def test_celery_gets_tls_at_sentinels_and_at_the_primary() -> None:
    conf = app_of(SENTINELS.replace("redis+", "rediss+") + "&ssl_ca_certs=ca.pem")
    tls = {"ssl_ca_certs": "ca.pem", "ssl_cert_reqs": "required"}
    assert conf.broker_use_ssl == conf.redis_backend_use_ssl == tls
    assert conf.broker_transport_options["sentinel_kwargs"] == {"password": "s", "ssl": True, **tls}


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(("text", "limit"), [("536870912\n", 2**29), ("max\n", None), ("9223372036854771712\n", None)])
def test_a_container_has_its_groups_memory(tmp_path: Path, file: str, text: str, limit: int | None) -> None:
    assert memory_of_container(tmp_path) is None, "without control groups"
    (tmp_path / "memory").mkdir()
    (tmp_path / file).write_text(text)
    assert memory_of_container(tmp_path) == limit
