"""Builds a release from its tag: `release.py [--skip NAME …] [--builder URI] [--build OPTIONS]` (`make release`).

build/release/VERSION gets the wheel and its source archive, the chart, an archive and an SBOM of each image,
SHA256SUMS, and provenance.json: an in-toto statement of SLSA provenance, which names the commit, the builder, what the
images are made of, and the digest of each file. It is not signed, and nothing is published: docs/release.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

TREE = Path(__file__).resolve().parent.parent
LOCKS = TREE / "docker" / "requirements"
IMAGES = sorted(path.stem for path in (TREE / "docker").glob("*.Dockerfile"))

PINNED = re.compile(r"(?P<image>[\w./-]+:[\w.-]+)@(?P<digest>sha256:[0-9a-f]{64})")
"""An image of another project, by its tag and its digest."""


class ReleaseError(Exception):
    """The release cannot be built; the text says what to do."""


class Release(NamedTuple):
    """What is released, and where its files go."""

    version: str
    commit: str
    time: str  # of the commit, in seconds since the epoch
    skipped: frozenset[str]  # steps and images
    options: list[str]  # of `docker build`
    target: Path


def released(skipped: frozenset[str], options: list[str]) -> Release:
    """What the tree releases.

    Raises:
        ReleaseError: it has changes, or the commit has no tag of its version.
    """
    if changed := _git("status", "--porcelain"):
        raise ReleaseError(f"the tree has changes that are in no commit:\n{changed}")
    version = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["version"]
    if f"v{version}" not in _git("tag", "--points-at", "HEAD").split():
        raise ReleaseError(f"this commit has no tag v{version}: git tag --annotate v{version}, or check out that tag")
    chart = (TREE / "charts" / "taxiway" / "Chart.yaml").read_text()
    if set(re.findall(r'^(?:appV|v)ersion: "?([^"\s]+)', chart, re.MULTILINE)) != {version}:
        raise ReleaseError(f"charts/taxiway/Chart.yaml: expected version and appVersion {version}")
    commit, time = _git("log", "-1", "--format=%H %ct").split()
    return Release(version, commit, time, skipped, options, TREE / "build" / "release" / version)


def wheel(release: Release) -> None:
    """The wheel and the source archive, the same bytes for the same commit."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(release.target), str(TREE)]
    _run(command, {"SOURCE_DATE_EPOCH": release.time})


def chart(release: Release) -> None:
    """The chart's package."""
    if not (helm := shutil.which("helm")):
        raise ReleaseError(f"chart: no helm on the PATH (fetch it: tests/cluster/fetch_helm.py), {_skip('chart')}")
    _run([helm, "package", str(TREE / "charts" / "taxiway"), "--destination", str(release.target)])


def images(release: Release) -> None:
    """Each image, built and saved."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        raise ReleaseError(f"images: no Docker engine answers: start one, {_skip('images')}")
    for image in (name for name in IMAGES if name not in release.skipped):
        tag = f"taxiway/{image}:{release.version}"
        labels = {"version": release.version, "revision": release.commit}
        marks = [f"--label=org.opencontainers.image.{name}={value}" for name, value in labels.items()]
        command = ["docker", "build", "--quiet", f"--file=docker/{image}.Dockerfile", f"--tag={tag}", *marks]
        _run([*command, *release.options, "."])
        _run(["docker", "save", f"--output={release.target / f'image-{image}.tar'}", tag])


def sboms(release: Release) -> None:
    """What each image holds."""
    _run(["docker/supply.sh", "sbom"])
    for image in (name for name in IMAGES if name not in release.skipped):
        shutil.copy(TREE / "build" / "sbom" / f"{image}.json", release.target / f"sbom-{image}.json")


STEPS: Mapping[str, Callable[[Release], None]] = {"wheel": wheel, "chart": chart, "sbom": sboms, "images": images}


def statement(release: Release, builder: str, started: datetime) -> dict[str, Any]:
    """The provenance of the files in the target: https://slsa.dev/spec/v1.0/provenance."""
    files = sorted(release.target.iterdir())
    asked = {"tag": f"v{release.version}", "skip": sorted(release.skipped), "build": release.options}
    definition = {"buildType": "urn:taxiway:make-release:1", "externalParameters": asked}
    times = {"startedOn": started.isoformat(), "finishedOn": datetime.now(UTC).isoformat()}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": file.name, "digest": {"sha256": _digest(file)}} for file in files],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {**definition, "resolvedDependencies": list(_materials(release))},
            "runDetails": {"builder": {"id": builder}, "metadata": times},
        },
    }


def _materials(release: Release) -> Iterator[dict[str, Any]]:
    """The commit, the locks of the images' packages, and the images that they are built on."""
    yield {"uri": f"pkg:generic/taxiway@{release.version}", "digest": {"gitCommit": release.commit}}
    for lock in sorted(LOCKS.glob("*.txt")):
        yield {"uri": lock.relative_to(TREE).as_posix(), "digest": {"sha256": _digest(lock)}}
    texts = [path.read_text() for path in sorted((TREE / "docker").glob("*.Dockerfile"))]
    for image, digest in sorted({found.group("image", "digest") for text in texts for found in PINNED.finditer(text)}):
        yield {"uri": f"docker://{image}", "digest": {"sha256": digest.removeprefix("sha256:")}}


def _skip(step: str) -> str:
    return f"or leave this out: make release SKIP={step}"


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", TREE, *words], capture_output=True, text=True, check=True).stdout.strip()


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, cwd=TREE, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ReleaseError(f"{shlex.join(command)} failed:\n{done.stderr or done.stdout}")


def main() -> int:
    """Build what is not skipped; 1 if something cannot be built."""
    parser = argparse.ArgumentParser(prog="release.py", description=__doc__)
    parser.add_argument("--skip", nargs="*", default=[], choices=[*STEPS, *IMAGES], metavar="NAME")
    parser.add_argument("--builder", default=f"urn:taxiway:builder:{socket.gethostname()}")
    parser.add_argument("--build", default="", help="options of docker build")
    asked, started = parser.parse_args(), datetime.now(UTC)
    try:
        release = released(frozenset(asked.skip), shlex.split(asked.build))
        shutil.rmtree(release.target, ignore_errors=True)
        release.target.mkdir(parents=True)
        for name, step in STEPS.items():
            sys.stdout.write(f"{name}: {'left out, as asked' if name in release.skipped else 'building'}\n")
            if name not in release.skipped:
                step(release)
    except (ReleaseError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"not released: {error}\n")
        return 1
    made = statement(release, asked.builder, started)
    (release.target / "provenance.json").write_text(json.dumps(made, indent=2) + "\n")
    sums = [f"{_digest(file)}  {file.name}\n" for file in sorted(release.target.iterdir())]
    (release.target / "SHA256SUMS").write_text("".join(sums))
    sys.stdout.write("".join(sums) + f"{release.target.relative_to(TREE)} has {len(sums)} files and SHA256SUMS\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
