"""Loading a recipe: the result, and that every mistake is reported with its line, key and fix."""

from __future__ import annotations

import types
import typing

import pytest
from pydantic import BaseModel

from tuna_peft.errors import UserError
from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.schema import Recipe


def mistakes(file, *overrides):
    with pytest.raises(UserError) as error:
        load_recipe(file, overrides)
    return str(error.value)


def test_a_sound_recipe(recipe_file):
    recipe = load_recipe(recipe_file)
    sft, probabilistic = recipe.stages
    assert sft.train["learning_rate"] == 1e-3
    assert probabilistic.train["margin"] == 0.2
    assert recipe.quantization.method == "nf4"


def test_local_paths_become_absolute_here_first_then_beside_the_recipe(recipe_file, tmp_path, monkeypatch):
    beside = str(tmp_path / "ranked.jsonl")
    assert load_recipe(recipe_file, check=False).stages[0].data.path == beside
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "ranked.jsonl").write_text("{}")
    monkeypatch.chdir(here)
    assert load_recipe(recipe_file, check=False).stages[0].data.path == str(here / "ranked.jsonl")


def test_what_tasks_judges_and_teachers_name_is_looked_for_beside_the_recipe_too(recipe_file, tmp_path, monkeypatch):
    for name in ("questions.jsonl", "answers.jsonl"):
        (tmp_path / name).write_text("{}")
    for name in ("judge", "teacher", "tokenizer", "tasks", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = "{prompts: {path: ranked.jsonl}, score: {model: teacher}}"
    server = "{base_url: 'http://localhost/v1', model: m}"
    served = f"{{prompts: {{path: ranked.jsonl}}, score: {{server: {server}, tokenizer: tokenizer}}}}"
    vicuna = "{path: questions.jsonl, against: answers.jsonl, judge: {model: judge}}"
    overrides = [
        f"stages.probabilistic.data={data}",
        f"evaluation.tasks={{vicuna: {vicuna}, lm_eval: {{tasks: [x], include_path: tasks}}}}",
    ]
    recipe = load_recipe(recipe_file, overrides)
    tasks, scored = recipe.evaluation.tasks, recipe.stages[1].data
    assert (scored.prompts.path, scored.score.model) == (str(tmp_path / "ranked.jsonl"), str(tmp_path / "teacher"))
    assert tasks.lm_eval.include_path == str(tmp_path / "tasks")
    assert [tasks.vicuna.path, tasks.vicuna.against, tasks.vicuna.judge.model] == [
        str(tmp_path / name) for name in ("questions.jsonl", "answers.jsonl", "judge")
    ]
    # A folder that is called like the stage `base` is not meant.
    recipe = load_recipe(recipe_file, [*overrides, "evaluation.tasks.vicuna.against=base"])
    assert recipe.evaluation.tasks.vicuna.against == "base"
    tokenizer = load_recipe(recipe_file, [f"stages.probabilistic.data={served}"]).stages[1].data.score.tokenizer
    assert tokenizer == str(tmp_path / "tokenizer")
    message = mistakes(recipe_file, *overrides, "evaluation.tasks.vicuna.against=answer.jsonl")
    assert "evaluation.tasks.vicuna.against" in message and "Did you mean `answers.jsonl`" in message
    message = mistakes(recipe_file, *overrides, "evaluation.tasks.vicuna.against=probabilstic")
    assert "no file 'probabilstic', and no stage of that name" in message and "you mean `probabilistic`" in message


def test_hub_ids_and_built_in_names_stay(recipe_file):
    overrides = ["base.model=org/model", "evaluation.tasks.ranking.path=builtin:pico-llama/x.jsonl"]
    recipe = load_recipe(recipe_file, overrides, check=False)
    assert recipe.base.model == "org/model"
    assert recipe.evaluation.tasks.ranking.path == "builtin:pico-llama/x.jsonl"


def test_all_mistakes_are_listed_in_the_order_of_the_file(write):
    file = write(
        """\
        name: x
        base: {modle: builtin:pico-llama}
        quantization: {method: nf5}
        lora: {r: "8", target_modules: 3}
        stages:
          - name: sft
            type: sft
            data: {path: data/absent.jsonl, limit: 0}
            train:
              learning_rat: 1e-5
              num_train_epochs: three
              lr_scheduler_type: cosin
              seed: 3
              hub_model_id: a/b
        """
    )
    text = mistakes(file, "seed=abc")
    assert [line.strip() for line in text.splitlines()] == [
        "the recipe has 12 mistakes:",
        f"{file}:2: base.model: this key is required.",
        f"{file}:2: base.modle: unknown key. Did you mean `model`?",
        f"{file}:3: quantization.method: expected 'nf4', 'fp4', 'int8' or 'none', found 'nf5' (text).",
        f"{file}:4: lora.r: expected an integer, found '8' (text).",
        f"{file}:4: lora.target_modules: expected 'all-linear' or a list, found 3 (an integer).",
        f"{file}:8: stages.sft.data.limit: expected a number greater than 0, found 0 (an integer).",
        f"{file}:10: stages.sft.train.learning_rat: trl.SFTConfig has no such field. Did you mean `learning_rate`?",
        f"{file}:11: stages.sft.train.num_train_epochs: expected a number, found 'three' (text).",
        f"{file}:12: stages.sft.train.lr_scheduler_type: 'cosin' is not one of its values. Did you mean `cosine`?",
        f"{file}:13: stages.sft.train.seed: this is not set in `train`. Set `seed` at the top of the recipe: "
        "it holds for every stage.",
        f"{file}:14: stages.sft.train.hub_model_id: this is not set in `train`. Publish the finished run with "
        "`push` instead; a stage is not pushed while it trains.",
        "override `seed=abc`: seed: expected an integer, found 'abc' (text).",
    ]


def test_a_lone_mistake_says_what_where_and_how_to_mend_it(recipe_file):
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file, ["stages.probabilistic.train.margn=0.1"])
    assert error.value.where == "override `stages.probabilistic.train.margn=0.1`: stages.probabilistic.train.margn"
    assert error.value.fix == "Did you mean `margin`?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.probabilistic.train.reduction=gap_men", "Did you mean `gap_mean`?"),
        ("stages.probabilistic.train.margin=true", "expected a number or 'auto', found true"),
        ("stages.probabilistic.name=sft", "each stage needs a different name; given twice: sft"),
        ("stages.sft.name=default", "a stage cannot be called `default`"),
        ("stages.sft.name=Stage One", "expected text that matches"),
        ("stages=[]", "stages: expected at least one entry"),
        ("base.revision=12", "Put it in quotes."),
        ("base=3", "base: expected a mapping of keys, found 3"),
        ("evaluation={tasks: {graded: {path: org/data}}}", "grader: this key is required"),
        ("evaluation.tasks.ranking.path=rankd.jsonl", "Did you mean `ranked.jsonl`?"),
        ("base.model=./absent", "there is no file or folder './absent'"),
        ("base.model=owner/model:latest", "there is no file or folder 'owner/model:latest'"),
        ("stages.sft.data.path='!!python/object:os.system'", "there is no file or folder '!!python/object:os.system'"),
        ("stages.sft.data={path: x/y, format: ranked, columns: {prompt: a}}", "`columns` has no effect"),
        ("prompt.template=Question", "has no {instruction} in it"),
        ("base.model=https://huggingface.co/owner/model", "Write `owner/model`."),
        ("base={model: 'builtin:pico-llama', revision: main}", "base.revision: this is for models on the Hub"),
    ],
)
def test_wrong_values(recipe_file, override, message):
    assert message in mistakes(recipe_file, override)


def test_a_missing_recipe_names_the_shipped_ones(tmp_path):
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "quikstart.yaml")
    assert "there is no such recipe file" in str(error.value)
    assert "Did you mean `quickstart`?" in str(error.value)


def models_below(model):
    yield model
    for field in model.model_fields.values():
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from models_below(part)


def _parts(annotation):
    arguments = typing.get_args(annotation)
    return [part for argument in arguments for part in _parts(argument)] if arguments else [annotation]


def test_every_key_is_described_and_null_is_the_default_of_what_takes_null():
    """`dump_recipe` leaves null out, which is sound only so; it writes null for `evaluation`."""
    for model in models_below(Recipe):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if types.NoneType in typing.get_args(field.annotation) and name != "evaluation":
                assert field.default is None, f"{model.__name__}.{name}"
