"""Every shipped recipe runs, on pico-LLaMA, with small data and few steps."""

import json

import pytest
from rounding import stack_kl_bound

from tuna_peft.recipe.feedback_schema import FeedbackSource
from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.shipped import shipped_recipes
from tuna_peft.run.pipeline import run_recipe

# These differ from each other in more than numbers, and from the quickstart, which the README's test runs. The other
# recipes run in the slow tests.
QUICK = ("two-stage", "paper/tuna-llama-7b", "smollm2-135m")
DATA = {"sft": "sft.json", "ranking": "teacher.json"}


def benchmarks(folder):
    """One instance of Super-NI and one example of LMentry."""
    example = {"input": "1 + 1", "output": "2"}
    instance = {"task": "task1_x", "category": "x", "id": "task1-a", "definition": ["Add."],
                "positive_examples": [example, example], "input": "2 + 2", "output": ["4"]}  # fmt: skip
    (folder / "superni.jsonl").write_text(json.dumps(instance) + "\n")
    fields = {"answer": 50, "distractor": 2, "n1": 2, "n2": 50, "answer_index": 1, "template_id": 0}
    (folder / "lmentry").mkdir()
    (folder / "lmentry" / "bigger_number.json").write_text(
        json.dumps({"examples": {"1": {"input": "2 or 50?", "metadata": fields}}})
    )
    return {"superni": folder / "superni.jsonl", "lmentry": folder / "lmentry"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in shipped_recipes()]
)
def test_runs(name, tmp_path):
    shipped = load_recipe(name, check=False)
    stages = [stage.name for stage in shipped.stages]
    overrides = ["base.model=builtin:pico-llama", "lora.r=8"]
    if shipped.prompt.template == "chat":  # pico-LLaMA has no chat template
        overrides.append("prompt.template=alpaca")
    for stage in shipped.stages:
        if isinstance(stage.data, FeedbackSource):
            key = f"stages.{stage.name}.data"
            overrides.append(f"{key}.prompts.limit=12")
            if stage.data.prompts.path.startswith("data/"):
                overrides += [f"{key}.prompts.path=builtin:pico-llama/prompts.jsonl", f"{key}.sample.max_new_tokens=8"]
            if stage.data.score is not None:
                overrides.append(f"{key}.score.model=builtin:pico-llama")
        elif stage.data.path.startswith("data/"):
            overrides.append(f"stages.{stage.name}.data={{path: builtin:pico-llama/{DATA[stage.type]}, limit: 32}}")
        cut = ("max_steps=2", "gradient_accumulation_steps=1", "max_length=256", "per_device_train_batch_size=4")
        overrides += [f"stages.{stage.name}.train.{key}" for key in cut]
    if shipped.named_evaluation:
        held_out = shipped.named_evaluation.tasks.given()
        files = {task: path for task, path in benchmarks(tmp_path).items() if task in held_out}
        overrides += [f"evaluation.tasks.{task}.path={path}" for task, path in files.items()]
        overrides += [f"evaluation.tasks.{task}.max_new_tokens=4" for task in files]
        overrides += [f"evaluation.tasks.{task}.limit=8" for task in held_out.keys() - files.keys()]
        own = {"ranking": "teacher.json", "graded": "heldout.jsonl"}
        for task in own.keys() & held_out.keys():
            if held_out[task].path.startswith("data/"):
                overrides.append(f"evaluation.tasks.{task}.path=builtin:pico-llama/{own[task]}")
        if "ranking" in held_out and held_out["ranking"].path.startswith("data/"):
            overrides.append("evaluation.tasks.ranking.max_length=256")
    report = run_recipe(load_recipe(name, overrides), tmp_path / "run")
    assert list(report["evaluation"]) == ["base", *stages]
    assert all(report["stages"][stage]["steps"] == 2 for stage in stages)
    assert report["exports"]["combined"]["divergence"]["kl_max"] <= stack_kl_bound(tmp_path / "run" / "stack")
