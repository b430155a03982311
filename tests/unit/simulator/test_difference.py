"""What a history would have cost and attained under another configuration."""

from __future__ import annotations

from io import StringIO

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from simulator.engine import Summary, simulate
from simulator.fleet import SERVICES, parse_fleet
from simulator.policies.taxiway import Taxiway
from simulator.reports import Comparison, compared, difference_table, sample_line, sampled, table
from simulator.traces import synthetic_trace, windows_of
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


@pytest.mark.parametrize("columns", [30, 60, 160])
def test_no_figure_is_cut_where_the_terminal_is_narrow(columns: int) -> None:
    shown = table("model", right=("cost", "p95"), first="policy")
    shown.add_row("taxiway", "sentiment:1", "$1234.56", "0.0236 s")
    console = Console(width=columns, record=True, file=StringIO())
    console.print(shown)
    text = console.export_text()
    assert "…" not in text
    assert sorted("".join(text.split())) == sorted("policymodelcostp95taxiwaysentiment:1$1234.560.0236s")


@given(count=st.integers(2, 9), each=st.floats(1, 6))
def test_windows_lie_apart_within_the_trace_and_begin_at_0(count: int, each: float) -> None:
    trace = synthetic_trace("poisson:rate=20,duration=60,size=1,output=0,seed=1", model="m")
    windows = windows_of(trace, count=count, each=each)
    assert len(windows) <= count
    assert all(window.arrival[0] >= 0 and window.arrival[-1] <= each for window in windows)
    assert sum(map(len, windows)) == pytest.approx(len(trace) * count * each / 60, rel=0.5)


def part(live: float, cost: float) -> Summary:
    none = dict.fromkeys(SERVICES)
    shares = {**none, "live": live}
    return Summary(policy="a", requests=1, attainment=shares, cost_usd=cost, score=cost, usd_by_class={"cpu": cost})


def test_windows_are_scaled_to_the_whole_and_shares_weigh_by_requests() -> None:
    asked = np.array([[30, 0, 0], [10, 0, 0]])
    runs = [(part(1.0, 2.0), part(1.0, 1.0)), (part(0.0, 2.0), part(1.0, 1.0))]
    found = sampled(runs, asked, count=4, each=10, of=400)  # two windows were empty
    assert (found.old.attainment["live"], found.new.attainment["live"]) == (0.75, 1.0)
    assert (found.old.cost_usd, found.new.usd_by_class["cpu"]) == (40.0, 20.0)
    assert found.difference.cost_usd == -20.0
    assert found.sample is not None
    deviation = np.std([-1, -1, 0, 0], ddof=1)
    assert found.sample.error.cost_usd == pytest.approx(2 * np.sqrt(0.9) * 10 * np.sqrt(4) * deviation)
    assert "±" in shown(found)[1]
    assert sample_line(found.sample).startswith("4 windows of 10 s of 0.1 h were replayed")


def test_what_does_not_differ_between_windows_has_no_error() -> None:
    found = sampled([(part(1.0, 2.0), part(1.0, 3.0))] * 3, np.array([[5, 0, 0]] * 3), count=3, each=10, of=300)
    assert found.sample is not None
    assert found.sample.error.cost_usd == pytest.approx(0)
    assert found.difference.cost_usd == pytest.approx(30)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found
