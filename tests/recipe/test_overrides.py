"""Overrides of recipe keys on the command line."""

from __future__ import annotations

import pytest

from tuna_peft.errors import UserError
from tuna_peft.recipe.document import parse_document
from tuna_peft.recipe.layers import apply_overrides

TEXT = """\
name: x
lora: {r: 16, alpha: 32}
stages:
  - name: one
    train: {learning_rate: 1e-3}
  - name: two
evaluation: null
"""


def overridden(*overrides):
    document = parse_document(TEXT, "f.yaml")
    apply_overrides(document, overrides)
    return document


def test_stages_go_by_name_or_index_and_values_are_yaml():
    document = overridden("stages.one.train.learning_rate=1e-5", "stages.1.lora.r=4", "lora.alpha=[a, 1]")
    assert document.data["stages"][0]["train"] == {"learning_rate": 1e-5}
    assert document.data["stages"][1]["lora"] == {"r": 4}
    assert document.data["lora"]["alpha"] == ["a", 1]


def test_sub_trees_and_null_replace_and_null_sections_grow():
    document = overridden("lora={r: 8}", "stages.one.train=null", "evaluation.ranked.path=a=b", "name=")
    assert document.data["lora"] == {"r": 8}
    assert document.data["stages"][0]["train"] is None
    assert document.data["evaluation"] == {"ranked": {"path": "a=b"}}
    assert document.data["name"] is None


def test_later_overrides_win():
    assert overridden("lora={r: 8}", "lora.r=2").data["lora"] == {"r": 2}


def test_an_overridden_key_is_placed_at_its_override():
    document = overridden("lora={r: 8}", "evaluation.ranked.path=x")
    assert document.place(("lora", "r")) == "override `lora={r: 8}`"
    assert document.place(("evaluation", "ranked")) == "override `evaluation.ranked.path=x`"
    assert document.place(("stages", 0, "train", "learning_rate")) == "f.yaml:5"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r", "override `lora.r`: expected key=value"),
        ("=3", "override `=3`: expected key=value"),
        ("lora..r=3", "expected key=value"),
        ("lora={r: 8", "override `lora={r: 8`: cannot read the value: not valid YAML"),
        ("lora.r=!!int x", "override `lora.r=!!int x`: cannot read the value: 'x' is not a value of type int"),
        ("stages.tow.train.x=1", "the recipe has no stage `tow`\n  Did you mean `two`?"),
        ("stages.7.train.x=1", "the recipe has no stage `7`\n  Valid here: one, two."),
        (f"stages.{'9' * 5000}.x=1", "the recipe has no stage `999"),
        ("name.x=1", "`name` is 'x', which has no keys"),
    ],
)
def test_overrides_that_lead_nowhere(override, message):
    with pytest.raises(UserError) as error:
        overridden(override)
    assert message in str(error.value)
