"""The JSON schema for editors and the help of single keys."""

from __future__ import annotations

import json
import re

import pytest

from tuna_peft.errors import UserError
from tuna_peft.recipe.json_schema import field_help, recipe_json_schema


def test_train_fields_follow_from_the_type_of_the_stage():
    schema = recipe_json_schema()
    definitions = schema["$defs"]
    assert "margin" in definitions["RankingTrain"]["properties"]
    assert "margin" not in definitions["SFTTrain"]["properties"]
    assert "packing" in definitions["SFTTrain"]["properties"]
    assert "output_dir" not in definitions["SFTTrain"]["properties"]
    assert definitions["RankingTrain"]["properties"]["reduction"]["enum"] == ["gap_mean", "pair_sum"]
    assert [branch["if"]["properties"]["type"]["const"] for branch in definitions["Stage"]["allOf"]] == [
        "sft",
        "ranking",
    ]


def test_every_reference_has_its_definition():
    schema = recipe_json_schema()
    references = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema)))
    assert references <= set(schema["$defs"])


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("lora.r", ["(integer, default 16)"]),
        ("quantization.method", ["nf4 | fp4 | int8 | none"]),
        ("stages.train.margin", ["of type ranking (number | auto, default 0.1)"]),
        ("stages.train.learning_rate", ["of type sft", "of type ranking"]),
        ("stages.data.columns.scores", ["higher is better"]),
        ("evaluation.tasks", ["Keys: ranking, graded"]),
    ],
)
def test_help_of_one_key(key, parts):
    text = field_help(key)
    assert all(part in text for part in parts)


def test_a_stage_may_stand_in_the_path_by_name_or_type():
    assert "of type sft" not in field_help("stages.ranking.train.learning_rate")
    assert field_help("stages.my-stage.train.margin").startswith("stages.my-stage.train.margin")


@pytest.mark.parametrize(
    ("key", "fix"), [("lora.alhpa", "`alpha`"), ("stages.train.margn", "`margin`"), ("x.y", "name")]
)
def test_an_unknown_key_gets_the_nearest(key, fix):
    with pytest.raises(UserError, match=fix):
        field_help(key)
