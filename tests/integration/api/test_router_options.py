"""Which interfaces a router opens, and which it does not."""

from pathlib import Path

import pytest

from api.__main__ import http_options, read_listening
from api.access import KeysError
from api.keys_file import write_keys
from tasks.settings import SettingsError
from tests.certificates import self_signed
from tests.narrowing import present


@pytest.mark.cases("given, said")
def test_an_interface_that_would_be_open_or_broken_is_not_opened(given: list[str], said: str) -> None:
    with pytest.raises((SettingsError, KeysError), match=said):
        read_listening(http_options({}).parse_args(given))


def test_an_interface_is_on_the_loopback_without_keys_by_default(tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    write_keys(keys, [])
    certificate, key = self_signed(tmp_path)
    variables = {"KEYS": keys, "TLS_CERT": certificate, "TLS_KEY": key, "HTTP_HOST": "0.0.0.0", "HTTP_PORT": "1"}

    plain = read_listening(http_options({}).parse_args([]))
    open_to_all = read_listening(
        http_options({f"TAXIWAY_{name}": str(value) for name, value in variables.items()}).parse_args([])
    )

    assert (plain.host, plain.port, plain.keys, plain.tls) == ("127.0.0.1", 8080, None, None)
    assert (open_to_all.host, open_to_all.port) == ("0.0.0.0", 1)
    assert present(open_to_all.keys).caller(b"") is None
    assert open_to_all.tls is not None
