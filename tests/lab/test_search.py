"""On fleets that nobody tuned on the search finds at least what operators' searches find, in the same twin."""

import numpy as np

from tests.random_fleets import leads


def test_a_search_finds_at_least_what_operators_find_with_as_many_plays() -> None:
    found = leads(range(40))
    assert found.max() <= 1.02
    assert np.exp(np.log(found).mean()) <= 0.85
