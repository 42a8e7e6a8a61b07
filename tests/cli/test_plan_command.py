"""`tuna-peft plan`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.planning.gpus import GPUS

BIG = ["base.model=meta-llama/Llama-3.1-70B"]


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_what_fits_is_described_phase_by_phase():
    result = plan("two-stage", "--gpu", "t4")
    assert result.exit_code == 0, result.output
    for words in ("train probabilistic", "evaluate: ranking", "base layers, nf4", "CUDA context", "the merged model",
                  "not measured with this package", "It fits: "):  # fmt: skip
        assert words in result.stdout


def test_what_does_not_fit_exits_with_1_and_says_what_to_change():
    result = plan("two-stage", *BIG, "--gpu", "RTX 4090")
    assert result.exit_code == 1
    assert "It does not fit" in result.stdout and "but not enough" in result.stdout
    assert "lora.r=" in result.stdout
    assert "Use a smaller model. Unchanged, it fits on:" in result.stdout


def test_json_holds_the_same_and_all_cards_make_a_table():
    result = plan("two-stage", "--gpu", "a100", "--json")
    made = json.loads(result.stdout)
    assert (
        made["fits"]
        and made["phases"][0]["peak_bytes"]
        == made["phases"][0]["allocated_bytes"] + (made["phases"][0]["margin_bytes"])
    )
    table = plan("two-stage", *BIG, "--gpu", "all")
    assert table.exit_code == 0
    assert all(gpu.name in table.stdout for gpu in GPUS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["two-stage", "--gpu", "RTX 9999"], "unknown GPU 'RTX 9999'"),
        (["two-stage", "base.model=org/never-seen", "--gpu", "t4"], "the Hub cannot be reached"),
        (["two-stage", "base.dtype=bfloat16", "--gpu", "t4"], "the T4 has no bf16"),
        (["quickstart", "lora.target_modules=[q_proj, embed_tokens]", "--gpu", "t4"], "not a linear layer"),
        (["no-such-recipe"], "there is no such recipe file"),
        (["{folder}"], "Give its recipe: {folder}/recipe.yaml"),
        (["{folder}/rows.jsonl"], "this is data, not a recipe"),
        (["two-stage", "stages.contextual.train.max_token_per_batch=1"], "Did you mean `max_tokens_per_batch`?"),
    ],
)
def test_mistakes_exit_with_2(tmp_path, arguments, message):
    for name in ("recipe.yaml", "rows.jsonl"):
        (tmp_path / name).touch()
    result = plan(*(argument.replace("{folder}", str(tmp_path)) for argument in arguments))
    assert result.exit_code == 2
    assert message.replace("{folder}", str(tmp_path)) in "".join(result.stderr.splitlines())
