"""Keys, their file, how often a tenant may ask, and how much at once."""

import stat
from datetime import UTC
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from api import access
from api.keys_file import main, read_keys, write_keys
from tasks.settings import TREE
from tasks.topology import parse_topology
from taxiway.errors import FleetUnavailable, RateLimitedError
from tests.narrowing import present

KEY = access.Key(id="one", digest=access.digest_of("secret"), tenant="lab", scopes=("submit",))
texts = st.text(min_size=1, max_size=20)
keys = st.builds(
    access.Key,
    id=texts,
    digest=st.just(""),
    tenant=texts,
    scopes=st.lists(st.sampled_from(access.SCOPES), min_size=1).map(tuple),
    expires=st.none() | st.datetimes(timezones=st.just(UTC)),
)
rings = st.lists(st.tuples(texts, keys), max_size=4, unique_by=(lambda one: one[0], lambda one: one[1].id)).map(
    lambda drawn: {secret: msgspec.structs.replace(key, digest=access.digest_of(secret)) for secret, key in drawn}
)
"""Keys by the secrets that they are for."""


@given(rings, texts, st.floats(0, 4e9))
def test_a_caller_is_whose_key_it_has_until_it_expires(known: dict[str, access.Key], other: str, now: float) -> None:
    ring = access.Keyring([*known.values()])
    for secret in {*known, other}:
        key, caller = known.get(secret), ring.caller(secret.encode(), now)
        if key is None or (key.expires is not None and now >= key.expires.timestamp()):
            assert caller is None
        else:
            assert caller is not None
            assert (caller.key, caller.tenant, caller.scopes) == (key.id, key.tenant, frozenset(key.scopes))


@given(st.text(), st.binary())
def test_any_text_is_keys_or_an_error_and_accepts_no_other_secret(text: str, secret: bytes) -> None:
    try:
        ring = access.parse_keys(text, "keys")
    except access.KeysError:
        return
    assert ring.caller(secret, 0.0) is None


@pytest.mark.parametrize(
    "line",
    [
        "SECRET",
        '{"id": "SECRET"}',
        '{"SECRET": 1}',
        access.written([KEY]).replace("lab", ""),
        access.written([KEY, KEY]),
    ]
    + [access.written([KEY]).replace(was, "SECRET") for was in (KEY.digest, "submit")],
)
def test_a_wrong_file_is_refused_by_its_line_and_never_shown(line: str) -> None:
    with pytest.raises(access.KeysError) as caught:
        access.parse_keys(f"\n{line}\n", "keys.jsonl")
    assert str(caught.value).startswith("keys.jsonl: ")
    assert "SECRET" not in str(caught.value)


def test_the_file_is_its_owners_alone_and_keeps_another_mode(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    write_keys(path, [KEY])
    first = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0o640)
    write_keys(path, [])
    assert (first, stat.S_IMODE(path.stat().st_mode)) == (0o600, 0o640)
    assert read_keys(path).keys == ()
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_is_made_shown_once_listed_and_revoked(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(main, [*arguments, "--file", str(path)], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    secret = run("new", "--tenant", "lab", "--scope", "read", "--expires", "30").strip()
    listed = run("list")
    (key,) = read_keys(path).keys

    assert (secret.startswith(access.PREFIX), len(secret)) == (True, len(access.PREFIX) + 43)
    assert secret not in path.read_text() + listed
    assert present(access.Keyring([key]).caller(secret.encode(), 0.0)).tenant == "lab"
    assert listed.startswith(f"{key.id}  lab  read  until ")
    run("revoke", key.id)
    assert read_keys(path).keys == ()
    with pytest.raises(access.KeysError, match=key.id):
        run("revoke", key.id)


@given(st.floats(0.01, 1e5), st.lists(st.floats(0, 3), min_size=1, max_size=30), st.floats(0, 1e6))
def test_no_tenant_is_let_by_faster_than_its_rate_and_its_burst(rate: float, pauses: list[float], start: float) -> None:
    now, full_at, taken, first = start, 0.0, 0, start
    for pause in pauses:
        now += pause
        full_at, wait = access.spend(full_at, now, rate)
        taken += wait == 0
        assert wait == 0 or access.spend(full_at, now + wait * 1.001 + 1e-6, rate)[1] == 0
    assert taken <= (now - first) * rate + max(access.BURST * rate, 1) + 1e-3


def test_a_tenants_own_rate_goes_before_the_limit() -> None:
    text = (TREE / "queues.yaml").read_text() + "\ntenants: {slow: {requests_per_second: 2}, other: {weight: 2}}\n"
    rates = access.TenantRates(parse_topology(text))
    assert sum(rates.wait("slow", 10.0) == 0 for _ in range(100)) == 2 * access.BURST
    assert rates.wait("slow", 10.0) == pytest.approx(0.5)
    assert all(rates.wait(tenant, 10.0) == 0 for tenant in ("other", "unnamed") for _ in range(100))


BODIES = parse_topology(
    (TREE / "queues.yaml").read_text()
    + "\nlimits: {bodies: 16MiB, all_bodies: 24MiB}\ntenants: {wide: {bodies: 20MiB}}\n"
)


@given(st.lists(st.tuples(st.sampled_from(["lab", "shop", "wide"]), st.integers(0, 17)), max_size=40))
def test_bodies_never_take_more_than_a_tenants_limit_or_the_routers(asked: list[tuple[str, int]]) -> None:
    bodies = access.Bodies(BODIES)
    held: list[tuple[str, int]] = []
    most = {"lab": 16, "shop": 16, "wide": 20}
    for tenant, size in asked:
        own, all_ = sum(s for t, s in held if t == tenant), sum(s for _, s in held)
        refusal = RateLimitedError if own + size > most[tenant] else FleetUnavailable if all_ + size > 24 else None
        try:
            bodies.take(tenant, size * 2**20)
        except FleetUnavailable as error:
            assert type(error) is refusal
            assert error.retry_after
            if held:
                given_back, size = held.pop(0)
                bodies.give_back(given_back, size * 2**20)
        else:
            assert refusal is None
            held.append((tenant, size))
