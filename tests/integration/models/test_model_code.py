"""Where the code that a model.yaml names is found: its own folder, ours, and of runtimes installed packages."""

import hashlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.check import check_configuration
from tasks.machine import look
from tasks.models.artefacts import ArtefactStore, derived_key
from tasks.models.files import CodeError, entry_code
from tasks.models.model import Model, parse_model
from tasks.settings import Settings
from tests import installed
from tests.builders import recorded
from tests.working import QUEUES, Tower, worker_process, worker_settings

SHORTEN = """
def make(inputs, output, options):
    output.write_bytes(inputs["raw"].read_bytes()[: options["keep"]])
"""
DOUBLING = """
def call(number):
    return {"number-after": 2 * number}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which another distribution is installed, for this process and those that it starts."""
    folder = installed.install(tmp_path / "site")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab_models"]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder."""
    folder = tmp_path / "models" / "lab"
    folder.mkdir(parents=True)
    (folder / "raw").write_bytes(b"abcdef")
    (folder / "shorten.py").write_text(SHORTEN)
    (folder / "doubling.py").write_text(DOUBLING)
    return folder


def described(folder: Path, recipe: str) -> str:
    text = recorded("models/lab.yaml").replace("{recipe}", recipe)
    return text.replace("{sha256}", hashlib.sha256((folder / "raw").read_bytes()).hexdigest())


def model(folder: Path, recipe: str = "shorten") -> Model:
    return parse_model(described(folder, recipe), "lab/model.yaml", str(folder))


def test_a_recipe_beside_model_yaml_makes_its_artefact(folder: Path, tmp_path: Path) -> None:
    (folder / "mirror_it.py").write_text(
        "def make(inputs, output, options):\n    output.write_bytes(inputs['raw'].read_bytes()[::-1])\n"
    )
    path = ArtefactStore(tmp_path / "cache").path(model(folder, "mirror-it"), "made")
    assert path.read_bytes() == b"fedcba"


def test_the_key_of_what_a_recipe_made_covers_its_text(folder: Path) -> None:
    keys = [derived_key(model(folder), "made")]
    (folder / "shorten.py").write_text("def make(inputs, output, options): ...\n")
    keys.append(derived_key(model(folder), "made"))
    (folder / "shorten.py").write_text("from workers.recipes.graph_text import save_graph\n")
    keys.append(derived_key(model(folder), "made"))
    assert len(set(keys)) == len(keys)


def test_a_module_beside_model_yaml_may_hold_dataclasses(folder: Path) -> None:
    (folder / "point.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass(frozen=True)\nclass Point:\n    x: int\n\n\ndef call(x):\n    return {'x': Point(x).x}\n"
    )
    assert entry_code("python", "point", str(folder)).load()(3) == {"x": 3}


def test_a_module_without_its_function_is_named(folder: Path) -> None:
    (folder / "idle.py").write_text("")
    with pytest.raises(CodeError, match=r"idle\.py: expected the function 'call' in it"):
        entry_code("python", "idle", str(folder)).load()


def test_a_missing_name_is_reported_with_the_known_ones_and_how_to_add_it(folder: Path) -> None:
    (folder / "tripling.py").write_text("\ndef call(number): ...\n")
    expected = (
        r"no callable 'halving': expected one of doubling, tripling; to add it, put halving\.py with the function "
        r"call beside model\.yaml$"
    )
    with pytest.raises(CodeError, match=expected):
        entry_code("python", "halving", str(folder))


@pytest.mark.parametrize("name", ["../lab/doubling", "a.b", "", "/etc/passwd"])
def test_a_name_with_a_path_in_it_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(CodeError, match="expected a name of letters, digits, - and _"):
        entry_code("python", name, str(folder))


def test_a_worker_serves_a_recipe_a_callable_and_an_installed_packages_runtime(
    package: Path, folder: Path, settings: Settings, tmp_path: Path
) -> None:
    queues = QUEUES.replace("[python, echo]", "[python, abacus]").replace("[echo, slab]", "[]")
    fleet = replace(worker_settings(settings, folder.parents[1], queues), cache=tmp_path / "cache")
    (folder / "model.yaml").write_text(described(folder, "shorten"))
    with worker_process(fleet), Tower(fleet) as tower:
        doubled, added = (
            tower.result(tower.order("lab", {"number": [20]}, variant=variant)) for variant in ("python", "abacus")
        )
    assert doubled.outputs == {"number-after": [40]}
    assert added.outputs == {"number-after": [23]}


def test_a_machine_has_the_version_of_a_registered_runtime(package: Path) -> None:
    assert look().runtimes["abacus"] == installed.VERSION


def test_a_runtime_that_is_not_installed_here_is_a_warning(package: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "queues.yaml").write_text(QUEUES.replace("[python, echo]", "[abacos, python]").replace("slab]", "]"))
    (folder / "model.yaml").write_text(described(folder, "shorten").replace("runtime: abacus", "runtime: abacos"))
    found = check_configuration(tmp_path / "queues.yaml", folder.parent)
    warnings = {one.subject: one.text for one in found if one.level == "warning" and "abacos" in one.text}
    expected = "no runtime 'abacos': expected one of abacus, echo, "
    assert expected in warnings["lab:1/abacus"]
    assert expected in warnings["queues.yaml"]
