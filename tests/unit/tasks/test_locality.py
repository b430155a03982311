import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.queues.locality import joined, missing
from tasks.topology import TopologyError, parse_topology

LABELS = st.sampled_from(["cloud", "edge", "eu", "ward"])
localities = st.none() | st.lists(LABELS, min_size=1, max_size=3).map("+".join)


@given(st.lists(localities, max_size=4), localities, st.sets(LABELS))
def test_a_source_of_labels_can_only_keep_data_closer(
    sources: list[str | None], more: str | None, has: set[str]
) -> None:
    before, after = joined(*sources), joined(*sources, more)
    assert set(missing(before, has)) <= set(missing(after, has))
    assert joined(more, *sources) == joined(*reversed(sources), more) == joined(after, before)
    assert missing(after, has) or not missing(more, has)


HARDWARE = "cpu: {device: cpu, runtimes: [echo], max_batch: 1, max_wait: 0, price: {usd_per_hour: 1}, labels: [LABEL]}"


@pytest.mark.parametrize(
    ("label", "rules", "flaw"),
    [
        ("ward", "tenants: {clinic: {locality: wrad}}", "tenants.clinic.locality: expected labels that one class has"),
        ("ward", "locality: {default: ward+eu}", "locality.default: expected labels that one class has"),
        ("ward+eu", "", r"hardware.cpu.labels.0: expected text without \+"),
    ],
)
def test_labels_that_no_class_has_are_an_error_of_queues_yaml(label: str, rules: str, flaw: str) -> None:
    text = (
        f"hardware: {{{HARDWARE.replace('LABEL', label)}}}\nservice: {{soon: {{}}}}\ndefault_service: soon\n{rules}\n"
    )
    with pytest.raises(TopologyError, match=flaw):
        parse_topology(text)
