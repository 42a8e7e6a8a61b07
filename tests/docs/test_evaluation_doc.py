"""docs/evaluation.md: its recipe is one, and it names every task."""

import re
from pathlib import Path

from tuna_peft.recipe.document import parse_document
from tuna_peft.recipe.evaluation_schema import EvaluationSettings, TaskSettings

DOC = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_recipe_is_sound_and_has_every_task():
    [block] = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)
    evaluation = parse_document(block, "evaluation.md").data["evaluation"]
    settings = EvaluationSettings.model_validate(evaluation, strict=True)
    assert settings.tasks.given().keys() == TaskSettings.model_fields.keys()
    assert all(f"**`{name}`**" in DOC for name in TaskSettings.model_fields)
