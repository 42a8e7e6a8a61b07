"""Every example in docs/data-formats.md reads."""

import re
from pathlib import Path

import pytest
import yaml

from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_ranked, load_sft

TEXT = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^`(\S+)`\n```(?:json|csv)\n(.*?)```\n```yaml\n(.*?)```", TEXT, flags=re.DOTALL | re.MULTILINE)


def test_there_is_one_for_each_format():
    assert len(EXAMPLES) == 16


@pytest.mark.parametrize(("name", "content", "recipe"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_example(tmp_path, monkeypatch, name, content, recipe):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content, encoding="utf-8")
    source = DataSource.model_validate(yaml.safe_load(recipe)["data"])
    dataset, report = (load_sft if name == "sft.json" else load_ranked)(source, PromptConfig())
    assert report.kept == report.read == len(dataset) > 0


def test_other_recipe_lines():
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)]
    for block in blocks:
        for key, value in block.items():
            {"data": DataSource, "prompt": PromptConfig}[key].model_validate(value)
    assert {key for block in blocks for key in block} == {"data", "prompt"}
