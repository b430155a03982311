"""What an image installs: all that its process imports, and no runtime that it does not need."""

import ast
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.suite.installing import MODEL_PACKAGES
from tasks.models.files import ENTRIES, entry_code, recipe_code
from tasks.models.folder import load_catalogue
from tasks.models.model import Derived, Model, Variant
from tasks.settings import TREE

pytestmark = pytest.mark.slow

OURS = {"taxiway", "tasks", "broker", "router", "api", "workers", "simulator", "controller", "benchmarks"}
RUNTIMES = {"onnxruntime", "onnxruntime-gpu", "torch", "jax"}
IMAGES = {
    "router": set(),
    "worker-cpu": {"onnxruntime"},
    "worker-cuda": {"torch"},
    "worker-tpu": {"jax"},
    "flower": set(),
    "controller": set(),
}

PROJECT: dict[str, Any] = tomllib.loads((TREE / "pyproject.toml").read_text())

WORKERS = {"worker-cpu": {"onnx", "python", "echo"}, "worker-cuda": {"torch", "echo"}, "worker-tpu": {"jax", "echo"}}
LOADED_BY_NAME = ("kombu.transport.redis", "celery.backends.redis")
"""What Celery loads for a `redis://` address; it does not require all that these import."""

PROCESSES = {
    "router": {*LOADED_BY_NAME, "api.__main__", "simulator.tuning.command"},
    "flower": {*LOADED_BY_NAME, "flower.command"},
    "controller": {"controller.__main__"},
}
"""The entry points of the other images."""


def installed_by(image: str) -> set[str]:
    """Every distribution that the image installs, as its lock says."""
    return {canonicalize_name(need.name) for need in locked(image)}


def locked(image: str) -> list[Requirement]:
    """The packages of an image's lock, each at its version."""
    lines = (TREE / "docker" / "requirements" / f"{image}.txt").read_text().splitlines()
    return [Requirement(line.removesuffix("\\").strip()) for line in lines if line[:1].isalnum()]


def requirements(groups: dict[str, list[str | dict[str, str]]], group: str) -> Iterator[Requirement]:
    for entry in groups[group]:
        if isinstance(entry, dict):
            yield from requirements(groups, entry["include-group"])
        else:
            yield Requirement(entry)


def imports(module: str) -> Iterator[str]:
    """What a module of ours imports when it is loaded, by full name; imports inside functions are left out."""
    for node in top_level(ast.parse(source_of(module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_module(node.module, alias.name))


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """A module's own statements, and those that it tries; not those for type checkers alone."""
    for node in tree.body:
        yield from node.body if isinstance(node, ast.Try) else [node]


def source_of(module: str) -> Path:
    if is_file(module):
        return Path(module)
    if module in LOADED_BY_NAME:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        return Path(spec.origin)
    path = TREE / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def is_file(module: str) -> bool:
    """Whether it is one that is loaded by its path: a model's own code."""
    return module.endswith(".py")


def is_module(package: str, name: str) -> bool:
    return package.partition(".")[0] in OURS and source_of(f"{package}.{name}").exists()


def imported(entries: Iterable[str]) -> tuple[set[str], set[str]]:
    """The modules of ours reachable from `entries`, and the top-level names, not Python's, that they import besides."""
    seen: set[str] = set()
    foreign: set[str] = set()
    waiting = list(entries)
    while waiting:
        module = waiting.pop()
        top = module.partition(".")[0]
        if top not in OURS and module not in LOADED_BY_NAME and not is_file(module):
            foreign.add(top)
        elif module not in seen:
            seen.add(module)
            waiting += [*imports(module), *parents(module)]
    return seen, foreign - sys.stdlib_module_names


def parents(module: str) -> list[str]:
    above = module.rpartition(".")[0]
    return [above] if above and module not in LOADED_BY_NAME and not is_file(module) else []


def modules_of(image: str) -> set[str]:
    """The modules that an image's process loads: its entry point's, and those it loads by name for its variants."""
    if image not in WORKERS:
        return set(PROCESSES[image])
    found = {*LOADED_BY_NAME, *tried_by(image)}
    for model in load_catalogue(TREE / "models").models.values():
        for variant in model.variants.values():
            if variant.runtime in WORKERS[image]:
                found |= {f"workers.runtimes.{variant.runtime}", *recipes(model, variant)}
                if variant.runtime in ENTRIES:
                    found.add(str(entry_code(variant.runtime, variant.entry, model.folder).source))
    return found


def dockerfile(image: str) -> str:
    return (TREE / "docker" / f"{image}.Dockerfile").read_text()


def tried_by(image: str) -> set[str]:
    """The modules that the image's build imports: the entry point's and those that this imports in functions."""
    (line,) = re.findall(r'^RUN python -c "import (.*)"$', dockerfile(image), re.MULTILINE)
    return set(line.split(", "))


def recipes(model: Model, variant: Variant) -> set[str]:
    """The recipes that make a variant's artefacts, and what those are made from."""
    found: set[str] = set()
    waiting = list(variant.artefacts.values())
    while waiting:
        artefact = model.artefacts[waiting.pop()]
        if isinstance(artefact, Derived):
            found.add(str(recipe_code(artefact.recipe, model.folder).source))
            waiting += artefact.inputs.values()
    return found


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_an_image_holds_the_runtime_of_its_device_and_no_other(image: str) -> None:
    assert installed_by(image) & RUNTIMES == IMAGES[image]


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_an_image_installs_whatever_its_process_imports(image: str) -> None:
    installed = installed_by(image)
    providers = importlib.metadata.packages_distributions()

    for name in sorted(imported(modules_of(image))[1]):
        brought_by = {canonicalize_name(distribution) for distribution in providers[name]}
        assert brought_by & installed, f"{name} is imported, and none of the image's groups brings it"


def test_a_peers_environment_in_the_benchmark_suite_has_whatever_the_batch_loop_imports() -> None:
    pipelines = {f"workers.pipelines.{file.stem}" for file in (TREE / "workers" / "pipelines").glob("[!_]*.py")}
    loop = {"benchmarks.suite.batch_loop", "workers.runtimes.echo", "workers.runtimes.onnx", *pipelines}
    providers = importlib.metadata.packages_distributions()

    lacking = {name for name in imported(loop)[1] if not {*MODEL_PACKAGES} & {*map(canonicalize_name, providers[name])}}

    assert not lacking


@pytest.mark.parametrize("image", sorted(WORKERS))
def test_an_image_holds_the_code_of_ours_that_its_process_loads(image: str) -> None:
    copied = set(re.findall(r"^COPY (\w+) \1$", dockerfile(image), re.MULTILINE))
    ours = {source_of(module) for module in imported(modules_of(image))[0] - {*LOADED_BY_NAME}}
    assert {file.relative_to(TREE).parts[0] for file in ours} <= copied


def test_the_fleet_group_holds_every_group_that_an_image_installs_but_the_heavy_ones() -> None:
    groups = PROJECT["dependency-groups"]
    fleet = {need.name for need in requirements(groups, "fleet")}
    for image in IMAGES:
        light = {one["include-group"] for one in groups[f"image-{image}"]} - {"torch", "tpu"}
        assert {need.name for group in light for need in requirements(groups, group)} <= fleet


def test_the_image_with_cuda_has_pypis_own_torch_and_the_cuda_libraries_that_it_was_built_for() -> None:
    versions = {need.name: str(need.specifier).removeprefix("==") for need in locked("worker-cuda")}
    assert re.fullmatch(r"[\d.]+", versions["torch"])  # no build of this machine's own, such as 2.13.0+cpu
    assert "nvidia-cuda-runtime" in versions


def test_the_oldest_python_that_taxiway_takes_needs_nothing_that_the_locks_lack() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    environment = {"python_version": "3.11", "python_full_version": oldest, "extra": ""}
    for image in IMAGES:
        installed = installed_by(image)
        for name in installed & {canonicalize_name(one.name) for one in importlib.metadata.distributions()}:
            below = [Requirement(line) for line in importlib.metadata.requires(name) or []]
            needed = {canonicalize_name(n.name) for n in below if n.marker is None or n.marker.evaluate(environment)}
            assert needed <= installed, f"{image}: {name} needs {needed - installed} on Python {oldest}"


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_a_lock_has_what_its_image_asks_for_each_file_by_its_hash(image: str) -> None:
    text = (TREE / "docker" / "requirements" / f"{image}.txt").read_text()
    versions = {canonicalize_name(need.name): str(need.specifier).removeprefix("==") for need in locked(image)}
    own = map(Requirement, PROJECT["project"]["dependencies"])
    for wanted in (*own, *requirements(PROJECT["dependency-groups"], f"image-{image}")):
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), f"{wanted}: run `make lock`"
    assert all("--hash=sha256:" in block for block in re.split(r"\n(?=\w)", text.strip()))
    assert f"docker/requirements/{image}.txt" in dockerfile(image)
