from hypothesis import given
from hypothesis import strategies as st

from tasks.queues.locality import joined, missing

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
