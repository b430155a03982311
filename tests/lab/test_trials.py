"""The trials' requests and fleets: complete, repeatable, and as the recipe that their figures were made with."""

import numpy as np
import pytest

from lab.changes import changes_of
from lab.trials.trial import LENGTH, SHARES, TRIALS
from simulator.fleet import SERVICES
from simulator.traces import Trace

Span = tuple[float, float]

trials = pytest.mark.parametrize("name", TRIALS)


@trials
def test_a_trial_is_the_same_again_for_a_seed_and_another_for_another(name: str) -> None:
    first, again, other = (TRIALS[name].trace(seed) for seed in (7, 7, 8))
    assert np.array_equal(first.arrival, again.arrival)
    assert not np.array_equal(first.arrival[:100], other.arrival[:100])


@trials
def test_a_trial_lasts_its_length_and_every_request_has_its_terms(name: str) -> None:
    workload = TRIALS[name].workload(TRIALS[name].trace(7))
    trace = workload.trace
    assert LENGTH - 10 < trace.arrival[-1] <= LENGTH
    assert (trace.service == TRIALS[name].trace(7).service).all()
    shares = [float((trace.service == number).mean()) for number in range(len(SERVICES))]
    assert shares == pytest.approx(SHARES, abs=0.02)
    assert sum(workload.fleet.penalties) > 0
    assert changes_of(workload.fleet) == TRIALS[name].events


def rise(trial: str, model: str, span: Span, *usual: Span) -> float:
    """How many times as often a model is asked for in a span of seconds as in its usual ones."""
    trace = TRIALS[trial].trace(7)
    times = trace.arrival[trace.model == trace.models.index(model)]

    def rate(*spans: Span) -> float:
        inside = sum(((times >= begin) & (times < end)).sum() for begin, end in spans)
        return float(inside) / sum(end - begin for begin, end in spans)

    return rate(span) / rate(*usual)


def test_in_a_drift_images_double_and_language_models_halve() -> None:
    for model, ratio in {"image": 2, "chat": 0.5, "sentiment": 1}.items():
        assert rise("drift", model, (540, LENGTH), (0, 450)) == pytest.approx(ratio, rel=0.2)


def figures(trace: Trace, model: str) -> list[float]:
    """Requests, means of size, output and live deadline, share in the second half, and deviation of counts in 10 s."""
    rows = trace.model == trace.models.index(model)
    live = rows & (trace.service == 0)
    counts = np.histogram(trace.arrival[rows], 90, (0, LENGTH))[0]
    means = [float(column.mean()) for column in (trace.size[rows], trace.output[rows], trace.deadline[live])]
    return [float(rows.sum()), *means, float((trace.arrival[rows] > LENGTH / 2).mean()), float(counts.std())]


def test_synthetic_language_models_are_about_as_busy_as_those_of_azure() -> None:
    """The figures of Azure's traces, seconds 1,500 to 2,400, are in `lab.trials.trial`."""
    traces = [TRIALS["steady"].trace(seed) for seed in range(4)]
    chat, big = ([figures(trace, model) for trace in traces] for model in ("chat", "big"))
    assert np.mean(chat, axis=0)[:3] == pytest.approx([6307, 1200, 155], rel=0.1)
    assert np.mean(big, axis=0)[:3] == pytest.approx([2131, 2024, 28], rel=0.15)
    assert np.mean([found[5] for found in big]) > 2 * np.sqrt(2131 / 90)  # more than twice Poisson's
