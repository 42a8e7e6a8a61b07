import pytest
from run_folder import write_run


@pytest.fixture
def run_folder(tmp_path):
    return write_run(tmp_path / "run")
