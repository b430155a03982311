"""The trials' traces are like those of the recipe that published figures were made with."""

import subprocess
import sys
from pathlib import Path

import pytest

from lab.rows import read_trace
from lab.trials.trial import TRIALS
from tasks.settings import TREE
from tests.lab.test_trials import figures

SHARED = TREE.parent / "shared"
RECIPE = SHARED / "trials" / "make_trials.py"


@pytest.mark.skipif(not RECIPE.exists(), reason="the shared trials' recipe and data are not here")
def test_traces_from_azure_are_like_those_of_the_recipe(tmp_path: Path) -> None:
    subprocess.run([sys.executable, RECIPE, tmp_path], check=True, capture_output=True)
    for written in tmp_path.glob("*.csv"):
        expected = read_trace(written, model="chat")
        trace = TRIALS[written.stem].trace(7, SHARED / "data")
        for model in expected.models:
            *means, variability = figures(trace, model)
            *theirs, variable = figures(expected, model)
            assert means == pytest.approx(theirs, rel=0.1)
            assert variability == pytest.approx(variable, rel=0.35)
