"""A small distribution of somebody else's, which registers a runtime by an entry point."""

from __future__ import annotations

from pathlib import Path

VERSION = "1.2"

_METADATA = f"Metadata-Version: 2.1\nName: lab-models\nVersion: {VERSION}\n"

_ENTRY_POINTS = """
[taxiway.runtimes]
abacus = lab_models.abacus
"""

_MODULES = {
    "__init__": "",
    "abacus": '''
class Abacus:
    """Adds the length of the file in the role `made` to whatever it gets."""

    def __init__(self, file):
        self.file = file
        self.length = 0

    def load(self):
        self.length = len(self.file.read_bytes())

    def run(self, batch):
        return {f"{name}-after": array + self.length for name, array in batch.items()}

    def unload(self):
        pass

    def memory(self):
        return 0


def open_variant(placed):
    return Abacus(placed.files["made"])
''',
}


def install(folder: Path) -> Path:
    """Write the distribution into a folder, which is given back: on `sys.path` it is installed."""
    about = folder / f"lab_models-{VERSION}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(_METADATA)
    (about / "entry_points.txt").write_text(_ENTRY_POINTS)
    (folder / "lab_models").mkdir()
    for name, text in _MODULES.items():
        (folder / "lab_models" / f"{name}.py").write_text(text)
    return folder
