import hashlib
import hmac
import re
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tasks.queues.locality import Locality, joined, missing
from tasks.queues.receipts import Chain, PlacementReceipt, flaws, lacking
from tasks.topology import Tenant, Topology
from tests.builders import a_class, a_topology


def topology(**locality: Any) -> Topology:
    classes = {"ward.eu": a_class(labels=("eu", "ward")), "ward": a_class(labels=("ward",)), "cloud": a_class()}
    return msgspec.structs.replace(
        a_topology(**classes), tenants={"clinic": Tenant(locality="ward")}, locality=Locality(**locality)
    )


def test_a_class_is_named_with_the_labels_that_it_lacks() -> None:
    assert lacking(["eu", "ward"], topology()) == {"cloud": ("eu", "ward"), "ward": ("eu",)}
    assert lacking(["ward"], topology()) == {"cloud": ("ward",)}


def sign(signed: bytes) -> bytes:
    return hmac.digest(b"key", signed, hashlib.sha256)


def verify(signature: bytes, signed: bytes) -> bool:
    return hmac.compare_digest(signature, sign(signed))


def lines(count: int, router: str = "r") -> list[bytes]:
    chain = Chain("edge", router, sign)
    labels = {"ward": ("tenant",)}
    return [
        chain.seal(
            PlacementReceipt(job=f"j{n}", event="placed", at=float(n), labels=labels, lacking={}, hardware_class="ward")
        )
        for n in range(1, count + 1)
    ]


@given(count=st.integers(1, 8), other=st.integers(0, 8), data=st.data())
def test_an_export_verifies_in_any_order_from_any_receipt_on(count: int, other: int, data: st.DataObject) -> None:
    kept = lines(count)[data.draw(st.integers(0, count - 1)) :] + lines(other, "another")
    assert list(flaws(data.draw(st.permutations([*kept, kept[0]])), verify)) == []


@given(count=st.integers(1, 5), data=st.data())
def test_a_line_with_any_other_byte_does_not_verify_and_is_named(count: int, data: st.DataObject) -> None:
    whole = lines(count)
    at = data.draw(st.integers(0, count - 1))
    place = data.draw(st.integers(0, len(whole[at]) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda one: one != whole[at][place]))
    whole[at] = whole[at][:place] + bytes([byte]) + whole[at][place + 1 :]
    assert any(flaw.startswith(f"line {at + 1}: ") for flaw in flaws(whole, verify))


@given(count=st.integers(3, 8), data=st.data())
def test_a_line_left_out_between_two_others_is_named(count: int, data: st.DataObject) -> None:
    whole = lines(count)
    gone = data.draw(st.integers(1, count - 2))
    del whole[gone]
    assert list(flaws(whole, verify)) == [f"line {gone + 1}: receipts {gone + 1} to {gone + 1} of router r are missing"]


def test_receipts_without_a_key_and_of_another_key_and_of_a_forked_chain_are_named() -> None:
    (unsigned,) = [Chain("edge", "r", None).seal(read(lines(1)[0]))]
    assert list(flaws([unsigned], verify)) == ["line 1: job j1: not signed"]
    (flaw,) = flaws(lines(1), lambda *_: False)
    assert re.search("the signature is not that of the site's key", flaw)
    forked = Chain("edge", "r", sign)
    forked.seal(read(lines(3)[2]))
    assert list(flaws([lines(1)[0], forked.seal(read(lines(3)[2]))], verify)) == [
        "line 2: receipt 2 of router r does not follow line 1"
    ]


def read(line: bytes) -> PlacementReceipt:
    return msgspec.convert(msgspec.json.decode(line)["receipt"], PlacementReceipt)


LABELS = st.sampled_from(["cloud", "edge", "eu", "ward"])
localities = st.none() | st.lists(LABELS, min_size=1, max_size=3).map("+".join)


@given(st.lists(localities, max_size=4), localities, st.sets(LABELS))
def test_labels_can_only_keep_data_closer(sources: list[str | None], more: str | None, has: set[str]) -> None:
    before, after = joined(*sources), joined(*sources, more)
    assert set(missing(before, has)) <= set(missing(after, has))
    assert joined(more, *sources) == joined(*reversed(sources), more) == joined(after, before)
    assert missing(after, has) or not missing(more, has)
