"""`extends`: what is merged and what is replaced, and that errors name the file and line of the mistake."""

from __future__ import annotations

from textwrap import dedent

import pytest

from tuna_peft.errors import UserError
from tuna_peft.recipe.layers import read_recipe
from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.shipped import shipped_recipes


@pytest.fixture
def files(tmp_path):
    """Writes recipe files by name."""

    def write(**texts):
        for name, text in texts.items():
            file = tmp_path / f"{name}.yaml"
            file.write_text(dedent(text))
        return file

    return write


def test_mappings_merge_stages_merge_by_name_and_all_else_is_replaced(files):
    file = files(
        below="""\
            name: below
            base: {model: a, dtype: float16}
            lora: {r: 8, target_modules: [q_proj, v_proj]}
            stages:
              - {name: one, type: sft, data: {path: one.jsonl}, train: {max_steps: 1, learning_rate: 1e-3}}
              - {name: two, type: sft, data: {path: two.jsonl}}
            evaluation: {batch_size: 3}
            """,
        above="""\
            extends: below
            name: above
            base: {model: b}
            lora: {target_modules: [k_proj]}
            stages:
              - {name: two, type: ranking}
              - {name: three, type: sft, data: {path: three.jsonl}}
              - name: one
                train: {max_steps: 9}
            evaluation: null
            """,
    )
    document = read_recipe(file)
    assert document.data == {
        "name": "above",
        "base": {"model": "b", "dtype": "float16"},
        "lora": {"r": 8, "target_modules": ["k_proj"]},
        "stages": [
            {"name": "one", "type": "sft", "data": {"path": "one.jsonl"},
             "train": {"max_steps": 9, "learning_rate": 1e-3}},
            {"name": "two", "type": "ranking", "data": {"path": "two.jsonl"}},
            {"name": "three", "type": "sft", "data": {"path": "three.jsonl"}},
        ],
        "evaluation": None,
    }  # fmt: skip
    places = {path: document.place(path).rpartition("/")[2] for path in document.places}
    assert places["base", "model"] == "above.yaml:3"
    assert places["base", "dtype"] == "below.yaml:2"
    assert places["stages", 0, "train", "max_steps"] == "above.yaml:9"
    assert places["stages", 0, "train", "learning_rate"] == "below.yaml:5"
    assert places["stages", 2, "data", "path"] == "above.yaml:7"
    assert document.place(("evaluation", "batch_size")).endswith("above.yaml:10")


def test_mistakes_are_named_in_the_file_that_holds_them(files):
    file = files(
        below="name: x\nbase: {modle: a, model: b}\nstages:\n  - {name: one, type: sft, data: {path: a/b}}\n",
        above="extends: below.yaml\nstages:\n  - {name: one, train: {learning_rat: 1}}\nextend: y\n",
    )
    with pytest.raises(UserError) as error:
        load_recipe(file)
    text = str(error.value)
    assert "below.yaml:2: base.modle: unknown key" in text
    assert "above.yaml:3: stages.one.train.learning_rat" in text
    assert "above.yaml:4: extend: unknown key. Did you mean `extends`?" in text


def test_paths_are_found_beside_the_file_that_is_extended(files, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}")
    files(
        **{"shared/below": "name: x\nbase: {model: a/b}\nstages: [{name: a, type: sft, data: {path: rows.jsonl}}]\n"}
    )
    recipe = load_recipe(files(above="extends: shared/below.yaml\n"), check=False)
    assert recipe.stages[0].data.path == str(folder / "rows.jsonl")


def test_a_shipped_recipe_is_extended_by_name_from_anywhere(files):
    recipe = load_recipe(files(mine="extends: two-stage\nname: mine\nbase: {model: org/other}\n"), check=False)
    shipped = load_recipe("two-stage", check=False)
    assert recipe == shipped.model_copy(
        update={"name": "mine", "base": shipped.base.model_copy(update={"model": "org/other"})}
    )
    assert "two-stage" in shipped_recipes()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": "extends: a\n"}, "a.yaml:1: the recipe extends itself: a.yaml -> a.yaml"),
        ({"b": "extends: a.yaml\n", "a": "name: x\nextends: ./b\n"}, "the recipe extends itself: a.yaml -> b.yaml"),
        ({"a": "extends: quikstart\n"}, "a.yaml:1: there is no recipe 'quikstart'"),
        ({"a": "extends: [x]\n"}, "a.yaml:1: `extends` is the path of a recipe, found ['x']"),
        ({"b": "name: [\n", "a": "extends: b\n"}, "b.yaml:2: not valid YAML"),
    ],
)
def test_what_cannot_be_extended(files, texts, message):
    with pytest.raises(UserError) as error:
        read_recipe(files(**texts))
    assert message in str(error.value)
