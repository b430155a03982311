"""What the images are made of: `supply.py lock`, `engines`, `bases`, `audit` and `sbom` (`make lock`, and so on).

`lock` writes docker/requirements/<image>.txt: every package that an image installs, at one version, each of its files
by its SHA-256, so that an image installs nothing else. For the image with CUDA these are PyPI's own wheels for Linux on
x86-64, PyTorch's with the CUDA version that it was built for; all files of such a release would be tens of gigabytes.
`engines` writes vLLM's newest release into the chart, and `bases` the digests that the images of other projects have
now. `audit` asks which of the locked versions have known vulnerabilities, and `sbom` writes what each image holds, as
CycloneDX. Each tool has an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parent.parent
LOCKS = TREE / "docker" / "requirements"
IMAGES = {
    "router": ("api", "simulator"),
    "worker-cpu": ("worker", "onnx"),
    "worker-cuda": ("worker", "torch"),
    "worker-tpu": ("worker", "tpu"),
    "flower": ("flower",),
    "controller": ("controller",),
}
"""The dependency groups of each image."""

ONE_PLATFORM = "worker-cuda"
"""The image that is locked for this platform alone."""

PINNED = re.compile(r"(?P<image>[\w./-]+:[\w.-]+)@(?P<digest>sha256:[0-9a-f]{64})")
"""An image of another project, by its tag and its digest."""

ENGINES = TREE / "charts" / "taxiway" / "files" / "engines.yaml"
VLLM = re.compile(r"(vllm/vllm-openai:v)[\w.]+")
"""The file of the chart's engines, and vLLM's image in it."""

PYTHON = (3, 11)
"""The images' Python: other ones need other packages."""

_LOCKER, _AUDITOR, _LISTER = "pip-tools==7.6.2", "pip-audit==2.10.1", "cyclonedx-bom==7.5.0"


def lock(folder: Path) -> int:
    """Write the locks."""
    if sys.version_info[:2] != PYTHON:
        sys.stderr.write(f"the images have Python {PYTHON[0]}.{PYTHON[1]}: run this with that one\n")
        return 1
    python, wanted = _tool(folder, _LOCKER), folder / "wanted.txt"
    options = ["--quiet", "--generate-hashes", "--allow-unsafe", "--strip-extras", "--no-annotate", "--no-header"]
    options += ["--no-emit-index-url", "--no-emit-trusted-host", "--no-emit-find-links", "--upgrade"]
    for image, groups in IMAGES.items():
        wanted.write_text("\n".join(requirements(groups)))
        if image == ONE_PLATFORM:
            (LOCKS / f"{image}.txt").write_text(_chosen(python, wanted))
            continue
        command = [python, "-m", "piptools", "compile", *options, "--output-file", str(LOCKS / f"{image}.txt")]
        subprocess.run([*command, str(wanted)], check=True)
        sys.stdout.write(f"wrote docker/requirements/{image}.txt\n")
    return 0


def _chosen(python: str, wanted: Path) -> str:
    """The lock of what pip would install on this machine, from the index alone; it downloads no wheel for that."""
    report, nothing = wanted.with_name("report.json"), wanted.with_name("no-wheels-of-this-machine")
    nothing.mkdir(exist_ok=True)
    options = ["--dry-run", "--ignore-installed", "--quiet", "--only-binary", ":all:", "--report", str(report)]
    command = [python, "-m", "pip", "install", *options, "--requirement", str(wanted)]
    subprocess.run(command, check=True, env={**os.environ, "PIP_FIND_LINKS": str(nothing)})
    lines = []
    for one in json.loads(report.read_text())["install"]:
        hashed = one["download_info"]["archive_info"]["hashes"]["sha256"]
        name, version = re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower(), one["metadata"]["version"]
        lines.append(f"{name}=={version} \\\n    --hash=sha256:{hashed}\n")
    return "".join(sorted(lines))


def bases(folder: Path) -> int:
    """Write the digest that each image of another project has behind its tag: in Dockerfiles, Compose and the chart."""
    chart = TREE / "charts" / "taxiway" / "values.yaml"
    places = [*(TREE / "docker").glob("*.Dockerfile"), TREE / "docker" / "compose.yaml", chart]
    images = {found["image"] for place in places for found in PINNED.finditer(place.read_text())}
    digests = {image: _digest(image) for image in sorted(images)}
    for place in places:
        place.write_text(PINNED.sub(lambda found: f"{found['image']}@{digests[found['image']]}", place.read_text()))
    for image, digest in digests.items():
        sys.stdout.write(f"{image}@{digest}\n")
    return 0


def engines(folder: Path) -> int:
    """Write the newest release of vLLM into the chart's engines, whose images have PyPI's versions as tags."""
    command = [sys.executable, "-m", "pip", "index", "versions", "vllm", "--disable-pip-version-check"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    version = said.partition("(")[2].partition(")")[0]
    before = ENGINES.read_text()
    after = VLLM.sub(rf"\g<1>{version}", before)
    ENGINES.write_text(after)
    sys.stdout.write(f"vLLM {version}: {'as before' if after == before else 'written'}\n")
    return 0


def _digest(image: str) -> str:
    """The digest of all platforms' image together, as the registry says it."""
    command = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{json .Manifest.Digest}}"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    digest: str = json.loads(said)
    return digest


def audit(folder: Path) -> int:
    """Print known vulnerabilities; 1 if there are any, 0 if there are none or the database is unreachable."""
    python, found = _tool(folder, _AUDITOR), 0
    for image in IMAGES:
        command = [python, "-m", "pip_audit", "--require-hashes", "--disable-pip", "--format", "json"]
        done = subprocess.run(
            [*command, "-r", str(LOCKS / f"{image}.txt")], capture_output=True, text=True, check=False
        )
        known = json.loads(done.stdout)["dependencies"] if done.stdout else []
        asked = [one for one in known if "vulns" in one]
        if not asked:
            sys.stdout.write(f"{image}: not audited: the advisory service cannot be reached, or knows none of this\n")
        for one in asked:
            for vulnerability in one["vulns"]:
                found += 1
                sys.stdout.write(f"{image}: {one['name']} {one['version']}: {vulnerability['id']}\n")
        if asked:
            sys.stdout.write(f"{image}: {len(asked)} of {len(known)} packages audited\n")
    return int(found > 0)


def sbom(folder: Path) -> int:
    """Write build/sbom/<image>.json."""
    python, target = _tool(folder, _LISTER), TREE / "build" / "sbom"
    target.mkdir(parents=True, exist_ok=True)
    for image in IMAGES:
        written = target / f"{image}.json"
        command = [python, "-m", "cyclonedx_py", "requirements", str(LOCKS / f"{image}.txt"), "--output-reproducible"]
        subprocess.run([*command, "--output-format", "JSON", "--output-file", str(written)], check=True)
        sys.stdout.write(f"wrote {written.relative_to(TREE)}\n")
    return 0


def requirements(groups: tuple[str, ...]) -> Iterator[str]:
    """What pyproject.toml asks for an image: the wheel's own dependencies and those of its groups."""
    project: dict[str, Any] = tomllib.loads((TREE / "pyproject.toml").read_text())
    yield from project["project"]["dependencies"]
    waiting = list(groups)
    while waiting:
        for entry in project["dependency-groups"][waiting.pop()]:
            if isinstance(entry, str):
                yield entry
            else:
                waiting.append(entry["include-group"])


def _tool(folder: Path, package: str) -> str:
    """The Python of an environment that has the tool."""
    venv.create(folder / "tool", with_pip=True)
    python = str(folder / "tool" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package], check=True)
    return python


def main() -> int:
    """The command that was named."""
    commands = {"lock": lock, "engines": engines, "bases": bases, "audit": audit, "sbom": sbom}
    parser = argparse.ArgumentParser(prog="supply.py", description=__doc__)
    parser.add_argument("command", choices=commands)
    command = parser.parse_args().command
    with tempfile.TemporaryDirectory() as folder:
        try:
            return commands[command](Path(folder))
        except subprocess.CalledProcessError as error:
            sys.stdout.write(f"{command}: not done: {' '.join(error.cmd[:4])} failed: no index or registry in reach?\n")
            return int(command != "audit")  # a check that cannot be made must not stop who works offline


if __name__ == "__main__":
    sys.exit(main())
