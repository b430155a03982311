"""What a history would have cost and attained under another configuration."""

from __future__ import annotations

from io import StringIO

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from simulator.engine import Summary, simulate
from simulator.fleet import SERVICES, parse_fleet
from simulator.policies.taxiway import Taxiway
from simulator.reports import Comparison, compared, difference_table
from simulator.traces import synthetic_trace
from simulator.workload import prepare

FLEET = """
default_model: m
classes:
  cpu: {count: 2, initial: 1, price: {usd_per_hour: 2}, memory: 1GiB, start: 1, max_batch: 1,
        curves: {m: {base: 0.1, slope: 0, load: 0}}}
services: {live: {share: 0.5, deadline: 1}, standard: {share: 0.5, deadline: 9}, bulk: {share: 0}}
"""
DOLLARS = st.floats(0, 1e6)
SHARES = st.one_of(st.none(), st.floats(0, 1))


def run(text: str) -> Summary:
    trace = synthetic_trace("poisson:rate=4,duration=60,size=1,output=0,seed=1", model="m")
    workload = prepare(trace, parse_fleet(text), seed=1)
    return simulate("taxiway", workload, Taxiway(workload), seed=1)


@st.composite
def summaries(draw: st.DrawFn) -> Summary:
    return Summary(
        policy="taxiway",
        requests=1,
        attainment={name: draw(SHARES) for name in SERVICES},
        cost_usd=draw(DOLLARS),
        score=draw(DOLLARS),
        starts_usd=draw(DOLLARS),
        idle_usd=draw(DOLLARS),
        usd_by_class=draw(st.dictionaries(st.sampled_from(["cpu", "gpu", "tpu"]), DOLLARS)),
    )


def shown(found: Comparison) -> list[str]:
    text = StringIO()
    Console(file=text, width=120).print(difference_table(found))
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def test_a_dearer_class_costs_more_by_its_price_and_attains_the_same() -> None:
    found = compared(run(FLEET), run(FLEET.replace("usd_per_hour: 2", "usd_per_hour: 3")))
    assert found.difference.attainment == {"live": 0.0, "standard": 0.0, "bulk": None}
    assert found.difference.cost_usd == pytest.approx(found.old.cost_usd / 2)
    assert found.difference.usd_by_class == {"cpu": pytest.approx(found.difference.cost_usd)}


@given(old=summaries(), new=summaries())
def test_a_difference_is_new_minus_old_and_survives_json(old: Summary, new: Summary) -> None:
    found = compared(old, new)
    assert found.difference.cost_usd == new.cost_usd - old.cost_usd
    assert sum(found.difference.usd_by_class.values()) == pytest.approx(
        sum(new.usd_by_class.values()) - sum(old.usd_by_class.values()), abs=1e-6
    )
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found
    assert not any("-$0.00" in line or "-0.0 " in line for line in shown(found))


def test_the_table_has_signs_and_a_dash_for_what_is_absent() -> None:
    none = dict.fromkeys(SERVICES)
    old = Summary(policy="a", requests=1, attainment={**none, "live": 0.9}, cost_usd=2, score=3, usd_by_class={"a": 2})
    new = Summary(policy="a", requests=1, attainment={**none, "live": 1.0}, cost_usd=1, score=1, usd_by_class={"b": 1})
    lines = shown(compared(old, new))
    assert "live in time 90.0 % 100.0 % +10.0 points" in lines
    assert "bulk in time – – –" in lines
    assert "cost $2.00 $1.00 -$1.00" in lines
    assert "cost of a $2.00 – -$2.00" in lines
    assert "cost of b – $1.00 +$1.00" in lines
