"""`make release` in a repository of its own: what it refuses, and what it says of the files that it builds."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

from tasks.settings import TREE

pytestmark = pytest.mark.slow

VERSION: str = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["version"]
BUILT = {f"taxiway-{VERSION}.tar.gz", f"taxiway-{VERSION}-py3-none-any.whl"}


def git(folder: Path, *words: str) -> str:
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *author, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def release(folder: Path, *skipped: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "docker/release.py", "--builder", "urn:test", "--skip", *skipped]
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with this tree in one commit, without a tag."""
    folder = tmp_path_factory.mktemp("origin")
    for name in git(TREE, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (TREE / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TREE / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "All")
    return folder


@pytest.fixture
def tree(origin: Path, tmp_path: Path) -> Path:
    git(origin, "clone", "--quiet", str(origin), str(tmp_path / "tree"))
    return tmp_path / "tree"


def test_a_tree_with_changes_is_not_released(tree: Path) -> None:
    git(tree, "tag", f"v{VERSION}")
    (tree / "README.md").write_text("changed")

    done = release(tree, "chart", "sbom", "images")

    assert (done.returncode, "README.md" in done.stderr) == (1, True)
    assert not (tree / "build" / "release").exists()


@pytest.mark.parametrize("tag", [None, "v0.0.9"])
def test_a_commit_without_a_tag_of_its_version_is_not_released(tree: Path, tag: str | None) -> None:
    if tag:
        git(tree, "tag", tag)

    done = release(tree, "chart", "sbom", "images")

    assert (done.returncode, f"no tag v{VERSION}" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("step", "variables"), [("images", {"DOCKER_HOST": "unix:///nowhere"}), ("chart", {"PATH": "/usr/bin:/bin"})]
)
def test_what_a_machine_cannot_build_is_named_with_how_to_leave_it_out(
    tree: Path, step: str, variables: dict[str, str]
) -> None:
    git(tree, "tag", f"v{VERSION}")

    done = release(tree, *({"wheel", "chart", "sbom", "images"} - {step}), **variables)

    assert (done.returncode, f"make release SKIP={step}" in done.stderr) == (1, True)


def test_the_provenance_names_the_commit_the_builder_and_the_digest_of_each_file(tree: Path) -> None:
    git(tree, "tag", f"v{VERSION}")

    done = release(tree, "chart", "sbom", "images")

    assert done.returncode == 0, done.stderr
    assert "images: left out, as asked" in done.stdout
    folder = tree / "build" / "release" / VERSION
    statement = json.loads((folder / "provenance.json").read_text())
    named = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    definition = statement["predicate"]["buildDefinition"]
    materials = {one["uri"]: one["digest"] for one in definition["resolvedDependencies"]}
    assert named == {name: sha256((folder / name).read_bytes()).hexdigest() for name in BUILT}
    assert materials[f"pkg:generic/taxiway@{VERSION}"] == {"gitCommit": git(tree, "rev-parse", "HEAD")}
    assert definition["externalParameters"]["skip"] == ["chart", "images", "sbom"]
    assert statement["predicate"]["runDetails"]["builder"] == {"id": "urn:test"}
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=False).returncode == 0


def test_two_builds_of_a_commit_are_the_same_bytes(tree: Path) -> None:
    git(tree, "tag", f"v{VERSION}")
    folder = tree / "build" / "release" / VERSION

    built = []
    for _ in range(2):
        assert release(tree, "chart", "sbom", "images").returncode == 0
        built.append({name: (folder / name).read_bytes() for name in BUILT})

    assert built[0] == built[1]
