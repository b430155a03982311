import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tasks.settings import TREE

pytestmark = pytest.mark.slow


def test_the_wheel_has_the_typed_client_and_its_command_alone_and_needs_no_package_of_the_fleet(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(TREE)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
        described = {name.rpartition("/")[2]: archive.read(name).decode() for name in names if ".dist-info/" in name}

    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"taxiway"}
    assert "taxiway/py.typed" in names
    assert "taxiway = taxiway.cli:main" in described["entry_points.txt"]
    needed = [line for line in described["METADATA"].splitlines() if line.startswith("Requires-Dist:")]
    assert not any(name in line for line in needed for name in ("celery", "kombu", "numpy", "onnxruntime", "litestar"))
