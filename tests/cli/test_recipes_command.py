"""`recipes` and `schema`."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.recipe.shipped import shipped_recipes


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_list_has_a_line_for_each_with_its_summary():
    lines = invoke("recipes", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(len(line.split()) > 3 for line in lines)


def test_show_prints_the_file():
    assert invoke("recipes", "show", "quickstart").stdout == shipped_recipes()["quickstart"].read_text()


def test_copy_to_a_folder_or_a_file_and_never_over_one(tmp_path):
    original = shipped_recipes()["quickstart"].read_text()
    assert invoke("recipes", "copy", "quickstart", tmp_path).exit_code == 0
    assert (tmp_path / "quickstart.yaml").read_text() == original
    assert invoke("recipes", "copy", "quickstart", tmp_path / "new" / "mine.yaml").exit_code == 0
    assert (tmp_path / "new" / "mine.yaml").read_text() == original

    (tmp_path / "quickstart.yaml").write_text("mine")
    refused = invoke("recipes", "copy", "quickstart", tmp_path)
    assert refused.exit_code == 2
    assert "the file exists already" in refused.stderr
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"
    assert invoke("recipes", "copy", "quickstart", tmp_path, "--force").exit_code == 0
    assert (tmp_path / "quickstart.yaml").read_text() == original


def test_an_unknown_name_exits_with_2():
    result = invoke("recipes", "show", "quikstart")
    assert result.exit_code == 2
    assert "Did you mean `quickstart`?" in result.stderr


def test_schema_prints_json_and_the_help_of_one_key():
    assert json.loads(invoke("schema").stdout)["title"] == "Recipe"
    assert "alpha / r" in invoke("schema", "--field", "lora.alpha").stdout
    assert invoke("schema", "--field", "lora.alhpa").exit_code == 2
