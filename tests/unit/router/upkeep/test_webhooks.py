"""Webhooks' decisions: who is notified, signatures, when it is tried again, and where events may go."""

import ipaddress
from base64 import b64encode
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.routing.webhooks import check_url, rotated
from router.decide import webhooks
from tasks.topology import Webhooks
from tasks.webhooks import WebhookEvent
from taxiway.contract.job import failure_meta
from taxiway.contract.keys import job_key
from taxiway.contract.request import EventType
from taxiway.errors import ExecutionError, InvalidRequestError

RULES = Webhooks()
keys = st.binary(min_size=24, max_size=64)


def endpoint(name: str = "one", *types: EventType, **more: Any) -> webhooks.WebhookEndpoint:
    return webhooks.WebhookEndpoint(
        id=f"we_{name}",
        tenant="lab",
        name=name,
        url=f"https://{name}.example/",
        event_types=types or get_args(EventType),
        created_at=1,
        updated_at=1,
        **more,
    )


@given(body=st.binary(max_size=200), own=st.lists(keys, min_size=1, max_size=3), now=st.floats(0, 4e9))
def test_each_secret_signs_as_it_does_alone(body: bytes, own: list[bytes], now: float) -> None:
    message, secrets = (
        webhooks.WebhookMessage("evt_1", body),
        [webhooks.SECRET + b64encode(one).decode() for one in own],
    )
    alone = [webhooks.headers_of(message, [secret], now)["webhook-signature"] for secret in secrets]
    assert webhooks.headers_of(message, secrets, now)["webhook-signature"].split(" ") == alone


@given(
    before=st.integers(0, 10_000),
    age=st.floats(0, 200_000),
    draw=st.floats(0, 1),
    status=st.sampled_from((0, 302, 400, 429, 500, 503)),
    retry_after=st.floats(0, 1e9),
)
def test_an_event_is_tried_while_it_has_time(
    before: int, age: float, draw: float, status: int, retry_after: float
) -> None:
    attempt = webhooks.Attempt(status, retry_after=retry_after)
    verdict = webhooks.judge(attempt, before=before, begun=1000.0, now=1000.0 + age, draw=draw, rules=RULES)
    assert verdict.outcome == ("dead" if age >= RULES.retry else "retry")
    assert verdict.fault
    if verdict.outcome == "retry":
        assert 0 < verdict.pause <= min(RULES.longest_pause, RULES.retry - age)


@pytest.mark.parametrize(("status", "outcome"), [(200, "delivered"), (204, "delivered"), (410, "dead"), (404, "retry")])
def test_an_answer_decides_by_its_status(status: int, outcome: str) -> None:
    assert (
        webhooks.judge(webhooks.Attempt(status), before=0, begun=0.0, now=0.0, draw=0.5, rules=RULES).outcome == outcome
    )


@pytest.mark.cases("host")
def test_a_private_address_is_forbidden_in_every_form(host: str) -> None:
    assert host in webhooks.forbidden(host, ())


PUBLIC = ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"]


@given(st.ip_addresses(v=4))
def test_no_form_of_an_ipv4_address_is_allowed_unless_the_address_is(address: ipaddress.IPv4Address) -> None:
    forms = [bool(webhooks.forbidden(form, ())) for form in (f"{address}", f"::ffff:{address}", f"64:ff9b::{address}")]
    assert len({*forms}) == 1
    assert not any(webhooks.forbidden(host, ()) for host in PUBLIC)


def test_a_network_that_is_named_is_allowed_and_no_other() -> None:
    networks = ("10.0.0.0/8", "fd00::/8")
    assert [webhooks.forbidden(host, networks) for host in ("10.1.2.3", "fd00::1", "::ffff:10.1.2.3")] == [""] * 3
    assert webhooks.forbidden("192.168.0.1", networks)
    assert webhooks.forbidden("2002:c0a8:1::", networks)  # embeds 192.168.0.1


@pytest.mark.cases("url", ["https://a.example/" + "x" * 2048])
def test_an_address_that_cannot_be_or_must_not_be_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^url: "):
        check_url(url, RULES)


def test_http_is_allowed_where_the_rules_say_so() -> None:
    check_url("https://a.example:8443/hook?x=1", RULES)
    check_url("http://a.example/", Webhooks(http=True))


def test_only_endpoints_with_the_event_type_or_named_ones_are_notified() -> None:
    ends = endpoint("ends", "job.completed", "batch.completed")
    fails = endpoint("fails", "job.failed")
    named = endpoint("named", only_named=True)
    endpoints = webhooks.Endpoints(RULES, {"lab": (ends, fails, named)})

    def stated(named: str | None, tenant: str = "lab") -> dict[str, list[str]]:
        found = endpoints.notified("job", tenant, named)
        return {} if found is None else found.endpoints

    assert stated(None) == {"completed": ["we_ends"], "failed": ["we_fails"], "cancelled": ["we_fails"]}
    assert stated("named")["failed"] == ["we_fails", "we_named"]
    assert stated("ends") == stated(None)
    assert stated(None, "shop") == {}
    for tenant, name in (("lab", "nobody"), ("shop", "ends")):
        with pytest.raises(InvalidRequestError, match=r"^webhook: "):
            stated(name, tenant)


def test_nothing_is_recorded_without_endpoints() -> None:
    assert webhooks.Endpoints().record("lab", None) == ""
    with pytest.raises(InvalidRequestError):
        webhooks.Endpoints().record("lab", "one")
    endpoints = webhooks.Endpoints(RULES, {"lab": (endpoint("one", "job.failed"),)})
    stated = {"failed": ["we_one"], "cancelled": ["we_one"]}
    recorded = {"endpoints": stated, "most": RULES.waiting, "most_dead": RULES.dead}
    assert msgspec.json.decode(endpoints.record("lab", None)) == recorded
    assert webhooks.Endpoints(RULES, {"lab": (endpoint("one", "batch.failed"),)}).record("lab", None) == ""


def test_a_secret_signs_until_its_overlap_is_over() -> None:
    first = endpoint(secrets=(webhooks.Secret("a"),))
    second = rotated(first, "b", now=100.0, overlap=10.0)
    assert (second.signing(105.0), second.signing(110.0)) == (["b", "a"], ["b"])
    assert rotated(second, "c", now=105.0, overlap=10.0).signing(109.0) == ["c", "b", "a"]
    assert rotated(second, "c", now=105.0, overlap=10.0).signing(112.0) == ["c", "b"]
    assert rotated(second, "c", now=105.0, overlap=0.0).signing(105.0) == ["c"]


def test_a_message_is_the_same_at_each_attempt_and_says_why_a_job_failed() -> None:
    meta = failure_meta("j", ExecutionError("no such tool")).decode()
    event = WebhookEvent("1", "job", "cancelled", 5.5, job_key("j"), "talk:1", "cancelled", meta)
    message = webhooks.message_of(event)
    assert message == webhooks.message_of(msgspec.structs.replace(event, since=99.0))
    assert msgspec.json.decode(message.body) == {
        "object": "event",
        "id": "evt_1",
        "type": "job.failed",
        "created_at": 5,
        "data": {"id": "j", "model": "talk:1", "state": "cancelled", "error": {"code": "execution_failed"}},
    }
    odd = webhooks.message_of(msgspec.structs.replace(event, meta="not JSON"))
    assert "error" not in msgspec.json.decode(odd.body)["data"]
