"""Reading YAML for recipes: types of scalars, line numbers, and what is rejected."""

from __future__ import annotations

import math

import pytest
import yaml

from tuna_peft.errors import UserError
from tuna_peft.recipe.document import RecipeDumper, parse_document, parse_value, read_document

# Each line is a list of nine aliases to the line above. Line n stands for v(n) = 1 + 9 v(n - 1) values with v(0) = 1:
# 74,732 up to line 5, 597,871 in line 6.
ALIAS_BOMB = "".join(
    f"{name}: &{name} [{', '.join([f'*{above}' if above else 'x'] * 9)}]\n"
    for above, name in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
)
# Each line is 50 levels deep by itself and 50 deeper than the line above.
ALIAS_CHAIN = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} {'[' * 50}*a{i - 1}{']' * 50}\n" for i in range(1, 100))


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
        ("-.INF", -math.inf),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("<<", "<<"),
        ("18446744073709551615", 2**64 - 1),
        ("'\U0001f41f \xa0'", "\U0001f41f \xa0"),
        ("!!str 12", "12"),
        ("!!float 12", 12.0),
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
    assert parse_document(text, "f").data == {"key": value}
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
        ("a: !!python/name:os.system x\n", "f.yaml:1: not valid YAML here: the tag `!!python/name:os.system`"),
        (
            "a: !!python/object:os.system {b: 1}\n",
            "f.yaml:1: not valid YAML here: the tag `!!python/object:os.system`",
        ),
        ("a: !!timestamp 2024-01-01\n", "f.yaml:1: not valid YAML here: the tag `!!timestamp`"),
        ("a: 1\nb: !!int abc\n", "f.yaml:2: 'abc' is not a value of type int"),
        ("a: 1\nb: !!bool perhaps\n", "f.yaml:2: 'perhaps' is not a value of type bool"),
        ("a: 1\nb: !!float x\n", "f.yaml:2: 'x' is not a value of type float"),
        ("a: 1\n? [b]\n: 2\n", "f.yaml:2: the key that is a list or a mapping is not text"),
        ("a: 1\nb: -" + "9" * 5000 + "\n", "f.yaml:2: an integer of 5,000 digits"),
        ("a: 1\n" + "9" * 500 + ": 1\n", "f.yaml:2: an integer of 500 digits"),
        ('a: 1\nb: "x\\ud83d"\n', "f.yaml:2: half of a surrogate pair"),
        ('a: 1\n"\\udc00": 1\n', "f.yaml:2: half of a surrogate pair"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', "f.yaml:2: not valid YAML"),
        ('a: 1\nb: "\\U00110000"\n', "f.yaml:2: not valid YAML"),
        ("a: 1\nb: \x00\n", "f.yaml:2: not valid YAML: unacceptable character"),
        ("a: 1\nb: " + "[" * 2000 + "]" * 2000 + "\n", "f.yaml:2: not valid YAML: nested more than 100 levels deep"),
        ("".join(" " * i + "a:\n" for i in range(2000)), "f.yaml:100: not valid YAML: nested more than 100 levels"),
        (ALIAS_BOMB, "f.yaml:6: more than 100,000 values"),
        (
            ALIAS_BOMB.replace("[", "{<<: [").replace("]", "]}").replace("{<<: [x", "{x: [x"),
            "f.yaml:6: more than 100,000",
        ),
        (ALIAS_CHAIN, "f.yaml:2: nested more than 100 levels deep"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_with_its_line(text, message):
    with pytest.raises(UserError) as error:
        parse_document(text, "f.yaml")
    assert str(error.value).startswith(message)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes("name: café".encode("latin-1"))
    with pytest.raises(UserError, match="r.yaml:1: not UTF-8"):
        read_document(file)


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "x", "completions": ["y"]}\n' * 30_000)
    with pytest.raises(UserError, match="rows.jsonl: too large for a recipe") as error:
        read_document(file)
    assert "data file" in error.value.fix


def test_aliases_that_stand_for_few_values_are_fine():
    text = "a: &a [1, 2]\n" + "".join(f"b{i}: *a\n" for i in range(500))
    assert parse_document(text, "f").data["b499"] == [1, 2]
