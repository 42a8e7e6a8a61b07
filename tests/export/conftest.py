"""One tiny base and one stack on it in NF4, shared by the export tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_llama import write_base, write_stack


@dataclass(frozen=True)
class Tiny:
    """Where the shared base and stack are; tests only read them."""

    base: str
    stack: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    base = write_base(root / "base")
    return Tiny(base, write_stack(root / "stack", base))
