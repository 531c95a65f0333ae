from pathlib import Path

import pytest
from photo_files import write_photos


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), {"cat": 20, "dog": 30, "elk": 5})
