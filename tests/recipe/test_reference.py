"""docs/recipe-reference.md matches the schema and has every key."""

import re
from pathlib import Path

import pytest

from tuna_peft.recipe.json_schema import RANKING_TRAIN, SFT_TRAIN, recipe_json_schema
from tuna_peft.recipe.reference import recipe_reference

PAGE = Path(__file__).parents[2] / "docs" / "recipe-reference.md"


@pytest.fixture(scope="module")
def reference():
    return recipe_reference()


def test_the_page_is_fresh(reference):
    hint = "run: tuna-peft schema --markdown > docs/recipe-reference.md"
    assert PAGE.read_text(encoding="utf-8") == reference, hint


def test_every_key_is_there(reference):
    schema = recipe_json_schema()
    wanted = set(schema["properties"])
    for name, definition in schema["$defs"].items():
        if name not in (SFT_TRAIN, RANKING_TRAIN):
            wanted |= set(definition.get("properties", {}))
    wanted |= {"margin", "mle_on", "activation_memory", "max_tokens_per_batch"}
    assert wanted - set(re.findall(r"^\| `(\w+)` \|", reference, re.MULTILINE)) == set()


def test_links_lead_to_sections(reference):
    sections = {
        re.sub(r"[^\w\s-]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^## (.*)", reference, re.M)
    }
    assert set(re.findall(r"\]\(#(\S+?)\)", reference)) <= sections
