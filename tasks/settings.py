"""What a fleet process reads from its environment: servers, files and the signing keys. Read once, at the edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from taxiway.contract.wire import SHORTEST, read_key
from taxiway.valkey import SCHEMES, parse

TREE = Path(__file__).resolve().parent.parent
"""The checkout that these packages run from."""


class SettingsError(ValueError):
    """A setting is missing or wrong: the variable, what was expected and what came."""

    def __init__(self, variable: str, expected: str, value: object) -> None:
        super().__init__(f"{variable}: expected {expected}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the broker is, which also keeps the fleet's state, and what the fleet is made of."""

    broker: str = field(repr=False)  # with a password
    secret: tuple[bytes, ...] = field(repr=False)  # the first signs tickets, and what any of them signed is believed
    queues: Path
    models: Path
    cache: Path
    producers: tuple[bytes, ...] = field(default=(), repr=False)  # what arrivals must be signed with, if with anything
    seals: tuple[bytes, ...] = field(default=(), repr=False)  # private keys of sealed labels

    def environment(self) -> dict[str, str]:
        """The variables that give a child process these settings."""
        return {
            "TAXIWAY_BROKER": self.broker,
            "TAXIWAY_SECRET": _text(self.secret),
            "TAXIWAY_PRODUCER_SECRET": _text(self.producers),
            "TAXIWAY_SEAL_KEYS": _text(self.seals),
            "TAXIWAY_QUEUES": str(self.queues),
            "TAXIWAY_MODELS": str(self.models),
            "TAXIWAY_CACHE": str(self.cache),
        }


def settings_from(environment: Mapping[str, str]) -> Settings:
    """The settings that `environment` holds.

    Raises:
        SettingsError: a variable is missing or wrong.
    """
    broker = _url(environment, "TAXIWAY_BROKER")
    if environment.get("TAXIWAY_STATE") and _url(environment, "TAXIWAY_STATE") != broker:
        expected = "none: messages and state are on one server, which TAXIWAY_BROKER names; unset it"
        raise SettingsError("TAXIWAY_STATE", expected, "another address")
    producers = "TAXIWAY_PRODUCER_SECRET"
    return Settings(
        broker=broker,
        secret=_keys(environment, "TAXIWAY_SECRET", "the same on every router and worker"),
        queues=queues_file(environment),
        models=models_folder(environment),
        cache=cache_directory(environment),
        producers=_keys(environment, producers, "the same on every router") if environment.get(producers) else (),
        seals=seal_keys(environment),
    )


def seal_keys(environment: Mapping[str, str]) -> tuple[bytes, ...]:
    """The private keys of sealed labels. Raises as above; whether they are keys, `SealKeys` says."""
    return _keys(environment, "TAXIWAY_SEAL_KEYS", "private keys") if environment.get("TAXIWAY_SEAL_KEYS") else ()


def on_socket(url: str) -> str:
    """An address `unix://…` as Celery and kombu take it, `redis+socket://…`; any other as it is."""
    if not url.startswith("unix://"):
        return url
    address = parse(url)
    account = f"{quote(address.username, safe='')}:{quote(address.password, safe='')}@" if address.password else ""
    return f"redis+socket://{account}{quote(str(address.places[0]))}?virtual_host={address.database}"


def queues_file(environment: Mapping[str, str]) -> Path:
    """The queues.yaml: `TAXIWAY_QUEUES`, else the checkout's."""
    return Path(environment.get("TAXIWAY_QUEUES") or TREE / "queues.yaml")


def models_folder(environment: Mapping[str, str]) -> Path:
    """The folder of the models' folders: `TAXIWAY_MODELS`, else the checkout's."""
    return Path(environment.get("TAXIWAY_MODELS") or TREE / "models")


def cache_directory(environment: Mapping[str, str]) -> Path:
    """Where model weights are kept: `TAXIWAY_CACHE`, else `taxiway` in the user's cache directory."""
    if environment.get("TAXIWAY_CACHE"):
        return Path(environment["TAXIWAY_CACHE"])
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taxiway"


def _url(environment: Mapping[str, str], variable: str) -> str:
    value = environment.get(variable, "")
    scheme, separator, _ = value.partition("://")
    if not separator or scheme not in SCHEMES:
        shown = f"{scheme}://…" if separator else value and "another text"  # never a password
        hint = " (routers take a RabbitMQ's arrivals with TAXIWAY_AMQP)" if scheme in ("amqp", "amqps") else ""
        raise SettingsError(variable, f"an address that starts with {'://, '.join(SCHEMES)}://{hint}", shown or None)
    if scheme.endswith("+sentinel") and "service=" not in value:
        raise SettingsError(variable, "?service=NAME, the name of what the sentinels watch", f"{scheme}://…")
    try:
        parse(value)
    except ValueError:
        raise SettingsError(variable, "NAME:PASSWORD@HOST:PORT/DATABASE after ://", f"{scheme}://…") from None
    if (
        scheme.startswith("rediss") and "ssl_cert_reqs=" not in value
    ):  # Celery requires it, and other clients default to it
        return f"{value}{'&' if '?' in value else '?'}ssl_cert_reqs=required"
    return value


def _keys(environment: Mapping[str, str], variable: str, where: str) -> tuple[bytes, ...]:
    text = environment.get(variable, "")
    try:
        return tuple(map(read_key, text.split(",")))
    except ValueError:
        expected = f"at least {2 * SHORTEST} hexadecimal digits, {where}, or several such keys with commas"
        raise SettingsError(variable, expected, "another text" if text else None) from None


def _text(keys: tuple[bytes, ...]) -> str:
    return ",".join(key.hex() for key in keys)
