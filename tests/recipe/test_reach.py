"""What a recipe can do beyond the package: every way to code and to other machines is listed."""

from __future__ import annotations

from pydantic import BaseModel

from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.reach import addresses, foreign_code, unusual_variables
from tuna_peft.recipe.schema import Recipe
from tuna_peft.recipe.shipped import shipped_recipes

SERVER = "{base_url: 'https://evil.example/v1', model: m, api_key_env: HOME_SECRET}"
FEEDBACK = "{prompts: {path: ranked.jsonl}, %s}"


def lists(recipe_file, *overrides):
    recipe = load_recipe(recipe_file, overrides)
    return list(foreign_code(recipe)), list(addresses(recipe)), unusual_variables(recipe)


def test_a_recipe_of_data_alone_reaches_nothing(recipe_file):
    assert lists(recipe_file) == ([], [], [])
    assert lists(recipe_file, "evaluation.tasks.graded={path: ranked.jsonl, grader: 'builtin:pico'}") == ([], [], [])


def test_every_way_to_code(recipe_file):
    code, _, _ = lists(
        recipe_file,
        "base.trust_remote_code=true",
        "evaluation.tasks.graded={path: ranked.jsonl, grader: 'my.grader:grade'}",
        "evaluation.tasks.lm_eval={tasks: [x], include_path: .}",
        "stages.probabilistic.data=" + FEEDBACK % "judge: {function: 'my.judge:rate'}",
    )
    assert len(code) == 4
    assert any("model builtin:pico-llama (base)" in line for line in code)
    assert any("imports the module my.grader (evaluation.tasks.graded.grader)" in line for line in code)
    assert any("imports the module my.judge (stages.1.data.judge.function)" in line for line in code)
    assert any("!function" in line and "lm_eval" in line for line in code)


def test_every_address_with_its_secret(recipe_file):
    _, sent, unusual = lists(
        recipe_file,
        "stages.probabilistic.data=" + FEEDBACK % f"judge: {{server: {SERVER}}}",
        "evaluation.tasks.vicuna={path: ranked.jsonl, judge: {server: "
        + SERVER.replace("HOME_SECRET", "OTHER_API_KEY").replace("evil", "good")
        + "}}",
        "export.push={repo: me/model, base_id: org/base}",
        "stages.sft.train.report_to=wandb",
    )
    assert len(sent) == 4
    assert any("variable HOME_SECRET to https://evil.example/v1 (stages.1.data.judge.server)" in line for line in sent)
    assert any("variable OTHER_API_KEY to https://good.example/v1" in line for line in sent)
    assert any("me/model on the Hub" in line for line in sent)
    assert any("wandb" in line for line in sent)
    assert unusual == ["HOME_SECRET"]


def test_the_server_of_samples_is_among_them(recipe_file):
    _, sent, unusual = lists(
        recipe_file,
        "stages.probabilistic.data={prompts: {path: ranked.jsonl}, judge: {function: 'builtin:pico'}, "
        f"sample: {{server: {SERVER}}}}}",
    )
    assert sent == [
        "sends prompts and the variable HOME_SECRET to https://evil.example/v1 (stages.1.data.sample.server)"
    ]
    assert unusual == ["HOME_SECRET"]


def test_only_variables_of_api_keys_need_no_yes(recipe_file):
    for name in ("SSH_KEY", "MONKEY", "API_KEY", "MY_API_KEY_OLD", "PATH"):
        server = SERVER.replace("HOME_SECRET", name)
        assert lists(recipe_file, "stages.probabilistic.data=" + FEEDBACK % f"judge: {{server: {server}}}")[2] == [
            name
        ]


def test_no_shipped_recipe_reaches_anything():
    for name in shipped_recipes():
        recipe = load_recipe(name, check=False)
        assert [*foreign_code(recipe), *unusual_variables(recipe)] == [], name


def test_no_new_field_is_forgotten():
    """A field that names code, a server or a secret must be known here, and to `reach`."""
    found, seen, todo = set(), set(), [Recipe]
    while todo:
        model = todo.pop()
        if model in seen:
            continue
        seen.add(model)
        for name, field in model.model_fields.items():
            if any(
                part in name for part in ("function", "grader", "trust", "url", "env", "include_path", "repo", "code")
            ):
                found.add(f"{model.__name__}.{name}")
            todo += models_in(field.annotation)
    assert found == {
        "BaseSettings.trust_remote_code", "GradedTask.grader", "JudgeSettings.function",
        "JudgeSettings.trust_remote_code", "LMEvalTask.include_path", "PushSettings.repo",
        "ScoreSettings.trust_remote_code", "ServerSettings.api_key_env", "ServerSettings.base_url",
        "StageServer.api_key_env", "StageServer.base_url",
    }  # fmt: skip


def models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in models_in(inner)]
