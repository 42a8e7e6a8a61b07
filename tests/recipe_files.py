"""A small recipe with its data, written to a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

RECIPE = """\
# A recipe for tests.
name: small
base:
  model: builtin:pico-llama
lora: {r: 16, alpha: 32}
stages:
  - name: sft
    type: sft
    data:
      path: ranked.jsonl
    lora:
      r: 4
    train:
      learning_rate: 1e-3
      num_train_epochs: 2
      per_device_train_batch_size: 2
  - name: probabilistic
    type: ranking
    data: {path: ranked.jsonl, limit: 2}
    train: {learning_rate: 1e-4, margin: .2}
evaluation:
  tasks:
    ranking: {path: ranked.jsonl}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A valid recipe, with its data file beside it."""
    rows = [{"prompt": f"p{i}", "completions": ["good", "bad"], "scores": [1.0, 0.0]} for i in range(3)]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes a recipe file with the given text."""

    def write_recipe(text: str) -> Path:
        file = tmp_path / "r.yaml"
        file.write_text(dedent(text))
        return file

    return write_recipe
