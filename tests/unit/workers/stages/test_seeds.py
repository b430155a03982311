"""The seeds of a job's rows: texts that are generated from one prompt differ, and come again with the same seed."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

from tasks.models.signature import bind
from tests.unit.workers.parts import MODELS, a_running_job
from workers.learned import Loaded
from workers.port import Item, Row
from workers.stages.admit import prepare


class Noted:
    """A pipeline that notes the seed of each prompt."""

    def __init__(self) -> None:
        self.seeds: list[tuple[Any, Any]] = []

    def prepare(self, row: Row, parameters: Mapping[str, Any]) -> Item:
        self.seeds.append((row["prompt"], parameters["seed"]))
        return Item({}, 1, parameters)


def seeds_of(prompts: Any, **parameters: Any) -> list[tuple[Any, Any]]:
    model, pipeline = MODELS.resolve("generate"), Noted()
    bound = bind(model, prompts, parameters)
    job = a_running_job(model, rows=bound.rows, parameters=bound.parameters)
    prepare(job, cast(Loaded, SimpleNamespace(key=job.key, pipeline=pipeline)))
    return pipeline.seeds


def test_a_prompt_that_comes_again_in_a_job_has_a_seed_one_higher_each_time() -> None:
    assert seeds_of(["a", "a"]) == [("a", None), ("a", None)], "left to chance"
    assert seeds_of(["a", "a", "b", b"c", "a"], seed=5) == [("a", 5), ("a", 6), ("b", 5), (b"c", 5), ("a", 7)]
