"""The profiles that are derived from public figures."""

import pytest

from lab.derive_profiles import derive
from tasks.models.folder import load_catalogue
from tasks.models.profiles import parse_profile, profile_path
from tasks.settings import TREE


@pytest.mark.skipif(not (TREE.parent / "shared" / "data").is_dir(), reason="the public data is not here")
def test_the_derived_profiles_in_the_repository_are_what_the_script_derives() -> None:
    for file in derive(TREE.parent / "shared" / "data", load_catalogue(TREE / "models").resolve):
        path = profile_path(TREE / "models", file.model, file.device)
        assert parse_profile(path.read_text(), str(path)) == file
        assert file.rows
