"""Every shipped recipe loads, and its opening comment says what a user needs."""

from __future__ import annotations

import json
import re

import pytest

from tuna_peft.errors import UserError
from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.shipped import find_recipe, shipped_recipe, shipped_recipes, summary

NAMES = sorted(shipped_recipes())


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_with_every_check(name, tmp_path):
    """With data in the places that a user fills in; everything else is as shipped."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "p", "completions": ["a", "b"], "scores": [1, 0]}) + "\n")
    as_shipped = load_recipe(name, check=False)
    overrides = [
        ".".join(["stages", as_shipped.stages[path[1]].name, *path[2:]] if path[0] == "stages" else path)
        + f".path={data}"
        for path, source in as_shipped.sources().items()
        if source.path.startswith("data/")
    ]
    benchmarks = as_shipped.named_evaluation.tasks.given() if as_shipped.named_evaluation else {}
    overrides += [f"evaluation.tasks.{task}.path={tmp_path}" for task in {"superni", "lmentry"} & benchmarks.keys()]
    assert load_recipe(name, overrides).name == name.rpartition("/")[2]


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_summary_command_and_hardware(name):
    file = shipped_recipes()[name]
    head = file.read_text().partition("\n\n")[0]
    assert len(summary(file)) > 20
    assert f"tuna-peft run recipes/{name}.yaml --output runs/{name}" in head
    assert "Hardware:" in head
    assert "Expected peak:" in head


def test_what_their_heads_and_the_docs_promise_is_what_the_planner_says(capsys):
    from benchmarks import hardware

    assert hardware.main(["--check"]) == 0, capsys.readouterr().out + "run: python -m benchmarks.hardware"


@pytest.mark.parametrize("name", [name for name in NAMES if "base.model=" in shipped_recipes()[name].read_text()])
def test_the_other_models_that_its_head_names_fit_its_card(name, monkeypatch):
    from tuna_peft.planning.from_recipe import plan_recipe
    from tuna_peft.planning.gpus import find_gpu
    from tuna_peft.planning.spec import Device

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    head = shipped_recipes()[name].read_text().partition("\n\n")[0]
    [card], [listed] = (
        re.findall(r'--gpu "([^"]+)"$', head, re.MULTILINE),
        re.findall(r"base\.model=([\w./-]+(?:, [\w./-]+)*)", head),
    )
    for model in listed.rstrip(".").split(", "):
        [plan], _ = plan_recipe(load_recipe(name, [f"base.model={model}"], check=False), [Device.of(find_gpu(card))])
        assert plan.fits, model


def test_recipes_are_found_by_name_and_a_file_wins(tmp_path, monkeypatch):
    assert find_recipe("quickstart") == shipped_recipes()["quickstart"]
    assert shipped_recipe("quickstart.yaml") == shipped_recipes()["quickstart"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_recipe("quickstart") == shipped_recipes()["quickstart"]
    (tmp_path / "two-stage").write_text("name: mine")
    assert find_recipe("two-stage").read_text() == "name: mine"


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match="Did you mean `quickstart`"):
        shipped_recipe("quikstart")
