"""A tiny base on disk, shared by the trainer tests."""

import pytest
from families import make_model


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    return folder
