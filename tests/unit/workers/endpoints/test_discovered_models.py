"""Models without a model.yaml: their names, their form, and what a model.yaml of the same name does."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.catalogue import Catalogue
from tasks.models.discovered import MOST_MODELS, Announced, discovered, discovered_by, fits, named, with_discovered
from tasks.models.tensor_spec import TensorSpec
from tests.unit.tasks.test_catalogue import model as described
from workers.endpoints import oip, openai
from workers.endpoints.protocol import Discovery, EndpointError

X, Y = TensorSpec("x", "FP32", (-1, 2)), TensorSpec("y", "FP32", (-1,))


def asked(asking: Discovery, answers: dict[tuple[str, str], object]) -> dict[str, Announced]:
    """What a server with these answers is found to have."""
    method, path, _ = next(asking)
    try:
        while True:
            method, path, _ = asking.send(json.dumps(answers[method, path]).encode())
    except StopIteration as found:
        models: dict[str, Announced] = found.value
        return models


@given(st.lists(st.text(max_size=80) | st.sampled_from(["a/Llama-3.1-8B", "b/llama-3.1-8b", "/models/x.gguf", "x"])))
def test_every_name_is_one_of_a_model_and_stands_for_one_call(calls: list[str]) -> None:
    names = named(calls)
    assert len(names) <= MOST_MODELS
    assert len(set(names.values())) == len(names)
    assert set(names.values()) <= set(calls)
    assert named(reversed(calls)) == names
    for name in names:
        described(name=name)  # raises for what is no name


def test_a_name_is_the_last_part_of_what_the_server_says() -> None:
    calls = ["meta-llama/Llama-3.1-8B-Instruct", "/root/SmolLM2.Q4_1.gguf", "other/Llama-3.1-8B-Instruct", "!!"]
    assert named(calls) == {
        "smollm2-q4-1": "/root/SmolLM2.Q4_1.gguf",
        "llama-3-1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
        "other-llama-3-1-8b-instruct": "other/Llama-3.1-8B-Instruct",
    }


@pytest.mark.parametrize(("context", "longest"), [(0, 1024), (1, 1), (512, 256), (32768, 1024)])
def test_an_answer_fits_the_context_that_is_announced(context: int, longest: int) -> None:
    assert discovered("found", "openai", Announced(context=context)).parameters["max_tokens"].default == longest


def test_a_model_yaml_keeps_its_name_also_a_wrong_one() -> None:
    mine, found = described(name="mine"), discovered_by([("openai", {"mine": Announced(), "new": Announced()})])
    catalogue = with_discovered(Catalogue({mine.id: mine}, {"broken": "it is wrong"}), found)
    assert catalogue.resolve("mine") is mine
    assert catalogue.resolve("new").discovered
    assert "broken:1" not in with_discovered(catalogue, discovered_by([("openai", {"broken": Announced()})])).models


def test_a_model_answers_to_the_servers_own_name_too_unless_that_is_taken() -> None:
    calls = {"tiny": "acme/Tiny-Llama", "mine": "acme/mine", "odd": "/root/x.gguf", "late": "llama3:8", "same": "same"}
    found = discovered_by([("openai", {name: Announced(called=called) for name, called in calls.items()})])
    mine = described(name="mine")
    catalogue = with_discovered(Catalogue({mine.id: mine}), found)
    assert catalogue.resolve("acme/Tiny-Llama") is catalogue.resolve("tiny")
    assert [name for name, _ in catalogue.bare_names() if "/" in name] == ["acme/Tiny-Llama"]
    assert catalogue.resolve("same").discovered
    assert catalogue.disabled == {}
    assert discovered("tiny", "openai", Announced(called="other")) is catalogue.resolve("tiny")


def test_engines_say_what_they_have() -> None:
    stated = [{"id": "talk", "max_model_len": 8192}, {"id": "chat"}, {"id": "embed"}]
    listed = {"data": stated, "models": [{"name": "embed", "capabilities": ["embedding"]}]}
    assert asked(openai.discover(), {("GET", "/models"): listed}) == {
        "talk": Announced(context=8192),
        "chat": Announced(),
        "embed": Announced("text"),
    }
    tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 2]}
    answers: dict[tuple[str, str], object] = {
        ("POST", "/v2/repository/index"): [
            {"name": "a/b", "state": "READY"},
            {"name": "fixed"},
            {"name": "off", "state": "X"},
        ],
        ("GET", "/v2/models/a%2Fb"): {"inputs": [tensor], "outputs": [{**tensor, "name": "y", "shape": [-1]}]},
        ("GET", "/v2/models/fixed"): {"inputs": [{**tensor, "shape": [2]}], "outputs": [tensor]},
    }
    assert asked(oip.discover(), answers) == {"a/b": Announced("tensors", (X,), (Y,))}
    answers["GET", "/v2/models/fixed"] = {
        "inputs": [{**tensor, "name": "in:0"}],
        "outputs": [{**tensor, "name": "a/b"}],
    }
    found = asked(oip.discover(), answers)["fixed"]
    assert [(one.name, one.source) for one in (*found.inputs, *found.outputs)] == [("in_0", "in:0"), ("a_b", "a/b")]
    assert not fits(Announced("tensors", (X, msgspec.structs.replace(X, source="x/x")), (Y,)))
    with pytest.raises(EndpointError, match="malformed"):
        asked(oip.discover(), {("POST", "/v2/repository/index"): {"models": []}})
    assert not fits(Announced("tensors"))
