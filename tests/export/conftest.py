"""One tiny base and one stack on it in NF4, shared by the export tests."""

from __future__ import annotations

import pytest
from tiny_llama import Tiny, write_base, write_stack


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Tests only read it."""
    root = tmp_path_factory.mktemp("tiny")
    base = write_base(root / "base")
    return Tiny(base, write_stack(root / "stack", base))
