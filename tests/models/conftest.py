"""One tiny base and one stack on it in NF4, shared by the model tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llama import write_base, write_stack


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base on disk; tests only read it."""
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def stack_path(base_path: str) -> Path:
    """A stack of `sft` and `ranking` on that base; tests that change it copy it first."""
    return write_stack(Path(base_path).with_name("stack"), base_path)
