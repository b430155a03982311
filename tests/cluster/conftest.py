"""One control plane for all tests of the folder, and helm and kubectl beside it; without them the tests skip."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.chart import chart_for
from tests.cluster.control_plane import ControlPlane, Kubelets


@pytest.fixture(scope="session")
def binaries() -> Path:
    """The folder with helm, kubectl and the control plane's programmes, as run.sh makes it."""
    folder = os.environ.get("TAXIWAY_KUBERNETES")
    if not folder:
        pytest.skip("TAXIWAY_KUBERNETES is not set: run `make cluster`")
    return Path(folder)


@pytest.fixture(scope="session")
def helm(binaries: Path) -> Path:
    return binaries / "helm"


@pytest.fixture(scope="session")
def plane(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("plane"), binaries) as running:
        yield running


@pytest.fixture
def kubelets(plane: ControlPlane) -> Iterator[Kubelets]:
    with Kubelets(plane) as running:
        yield running


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chart_for(tmp_path_factory.mktemp("chart"))
