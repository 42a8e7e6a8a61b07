"""YAML as recipes read it: typed scalars, places, and what is refused."""

from __future__ import annotations

import math

import pytest
import yaml

from tuna_peft.errors import UserError
from tuna_peft.recipe.document import RecipeDumper, RecipeLoader, parse_document, parse_value, read_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1e5", 1e5),
        ("1.e-3", 1e-3),
        (".5", 0.5),
        ("1E+2", 100.0),
        ("-2", -2),
        ("012", 12),
        ("0", 0),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("null", None),
        ("", None),
        ("none", "none"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1e5b2", "1e5b2"),
        ("'1e-5'", "1e-5"),
        ("[q_proj, 1e-2]", ["q_proj", 0.01]),
        ("{r: 8}", {"r": 8}),
        (".inf", math.inf),
    ],
)
def test_scalars_have_the_types_of_yaml_1_2(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "value",
    ["1e-5", "no", "012", "true", "null", "", "~", "1_000", "2024-01-01", "a: b", "# x", "<<", "=", 1e-5, 1e22],
)
def test_what_is_dumped_is_read_back_by_us_and_by_plain_yaml(value):
    text = yaml.dump({"key": value}, Dumper=RecipeDumper)
    assert yaml.load(text, Loader=RecipeLoader) == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


def test_places_are_lines_and_stages_go_by_name():
    document = parse_document("name: x\nstages:\n  - name: one\n    lora: {r: 8}\n  - 3\n", "f.yaml")
    assert document.place(("stages", 0, "lora", "r")) == "f.yaml:4"
    assert document.place(("stages", 0, "not", "there")) == "f.yaml:3"
    assert document.dotted(("stages", 0, "lora", "r")) == "stages.one.lora.r"
    assert document.dotted(("stages", 1)) == "stages[1]"


def test_merge_keys_give_way_to_own_keys():
    text = "a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}\nc: {<<: [{x: 5}, *a]}\n"
    assert parse_document(text, "f").data == {"a": {"x": 1, "y": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 5, "y": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml: the recipe is empty"),
        ("# only a comment\n", "f.yaml: the recipe is empty"),
        ("- a\n", "f.yaml: a recipe is a mapping"),
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: the key `a` is given twice, first in line 1"),
        ("a:\n  - {b: 1,\n     b: 2}\n", "f.yaml:3: the key `b` is given twice, first in line 2"),
        ("a: 1\n 2: 3\n", "f.yaml:2: not valid YAML"),
        ("a: 1\n2: 3\n", "f.yaml:2: the key 2 is not text"),
        ("a: [1, 2\n", "f.yaml:2: not valid YAML"),
        ("a: &a [*a]\n", "f.yaml:1: an alias contains itself"),
        ("a: {<<: 3}\n", "f.yaml:1: `<<` merges mappings only"),
        ("a: !!python/name:os.system x\n", "f.yaml:1: not valid YAML"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_with_its_line(text, message):
    with pytest.raises(UserError) as error:
        parse_document(text, "f.yaml")
    assert str(error.value).startswith(message)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes("name: café".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_document(file)
