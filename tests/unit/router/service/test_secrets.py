"""Passwords, keys and the signing secret stand in no log line, no error and no representation."""

import logging
import secrets
import sys
from pathlib import Path

import pytest

from api.errors import body_of
from router.service.admission import Rules
from tasks.models.catalogue import Catalogue
from tasks.settings import SettingsError, settings_from
from tasks.telemetry import JsonLines, redacted
from tasks.topology import load_topology
from taxiway import Client, TaxiwayError
from taxiway.errors import BrokerUnavailableError

PASSWORD = "hush-hush"
KEY = f"taxiway_{secrets.token_urlsafe(32)}"
SECRET = "ab" * 32


def logged(message: str, *args: object, **extra: str) -> str:
    try:
        raise OSError(f"no way to amqp://me:{PASSWORD}@host/vhost for {KEY}")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, message, args, sys.exc_info())
    for name, value in extra.items():
        setattr(record, name, value)
    return JsonLines().format(record)


def test_what_is_logged_holds_no_password_and_no_key() -> None:
    line = logged(f"at redis://:{PASSWORD}@host:1/0", url=f"rediss://me:{PASSWORD}@host", header=f"Bearer {PASSWORD}")
    assert PASSWORD not in line
    assert KEY not in line
    assert "amqp://…@host/vhost" in line
    assert "rediss://…@host" in line


@pytest.mark.parametrize("text", ["http://host/a@b", "mail me@host", "taxiway_short", "a: //b", "10:00 // x @ y"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_no_answer_of_the_http_api_reveals_the_brokers_address_or_password() -> None:
    assert PASSWORD.encode() not in body_of(BrokerUnavailableError(f"redis://:{PASSWORD}@host did not answer"))


@pytest.mark.parametrize(
    "url", [f"redis://me:{PASSWORD}/@host", f"http://me:{PASSWORD}@", f"http://me:{PASSWORD}/@host"]
)
def test_a_wrong_address_is_reported_without_its_password(url: str) -> None:
    with pytest.raises(TaxiwayError) as caught:
        Client(url)
    assert PASSWORD not in str(caught.value)


def test_a_key_that_cannot_be_one_is_not_shown_and_one_for_a_broker_is_refused() -> None:
    for url, key in (("http://host", f"{PASSWORD}\r\nx: y"), ("redis://host", PASSWORD)):
        with pytest.raises(TaxiwayError) as caught:
            Client(url, key=key)
        assert PASSWORD not in str(caught.value)


def test_settings_and_rules_show_no_secret(tmp_path: Path) -> None:
    settings = settings_from({"TAXIWAY_BROKER": f"redis://:{PASSWORD}@host", "TAXIWAY_SECRET": SECRET})
    rules = Rules(load_topology(settings.queues), Catalogue({}), settings.secret)
    shown = f"{settings!r} {rules!r}"
    assert PASSWORD not in shown
    assert repr(settings.secret) not in shown
    with pytest.raises(SettingsError) as caught:
        settings_from({"TAXIWAY_BROKER": f"ftp://me:{PASSWORD}@host", "TAXIWAY_SECRET": SECRET})
    assert PASSWORD not in str(caught.value)
