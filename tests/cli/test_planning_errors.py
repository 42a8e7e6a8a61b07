"""What `plan` and `run` say of a card, a model or a recipe that will not do, as a user sees it."""

from __future__ import annotations

import json

import huggingface_hub.constants
import pytest
from refusing_hub import hub  # noqa: F401 - a fixture
from typer.testing import CliRunner

from tuna_peft.cli.app import app
from tuna_peft.planning.gpus import find_gpu
from tuna_peft.planning.spec import Device
from tuna_peft.run import preflight

FEEDBACK = {"prompts": {"path": "builtin:pico-llama/prompts.jsonl", "limit": 8}}


def tuna(*arguments):
    return CliRunner().invoke(app, [*arguments])


def run_on(monkeypatch, tmp_path, device, *overrides):
    """`run` on a device that this machine does not have; nothing may be left behind but a log."""
    monkeypatch.setattr(preflight, "this_device", lambda setting: device)
    return tuna("run", "quickstart", *overrides, "--output", str(tmp_path / "run"))


GATED = "the model is gated\n  Accept its terms at https://huggingface.co/org/gated, then run `hf auth login` here."
ABSENT = (
    "there is no such model on the Hub, or it is private\n"
    "  Check the name; for a private model run `hf auth login` first. A local path starts with ./ or /."
)


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(("model", "message"), [("org/gated", GATED), ("org/absent", ABSENT)])
def test_a_model_that_cannot_be_had(hub, tmp_path, command, model, message):  # noqa: F811
    more = ["--gpu", "t4"] if command == "plan" else ["--output", str(tmp_path / "run")]
    result = tuna(command, "quickstart", f"base.model={model}", *more)
    assert result.exit_code == 2
    assert f"error: {model}: {message}" in result.stderr


def test_a_gated_model_of_known_sizes_is_planned_and_a_warning_says_how_to_get_it(hub, caplog):  # noqa: F811
    result = tuna("plan", "two-stage", "base.model=meta-llama/Llama-2-7b-hf", "--gpu", "t4")
    assert result.exit_code == 0 and "sizes from the table of known models" in result.stdout
    assert "a run will stop here: meta-llama/Llama-2-7b-hf: the model is gated" in caplog.text
    assert "hf auth login" in caplog.text


def test_no_network_means_the_cache_and_says_so(hub, monkeypatch, caplog):  # noqa: F811
    online = tuna("plan", "two-stage", "base.model=org/fine", "--gpu", "t4")
    assert online.exit_code == 0 and "sizes from the Hub\n" in online.stdout
    for setting in ("HUGGINGFACE_CO_URL_TEMPLATE", "ENDPOINT"):
        there = getattr(huggingface_hub.constants, setting)
        monkeypatch.setattr(huggingface_hub.constants, setting, there.replace(hub, "http://127.0.0.1:9"))
    offline = tuna("plan", "two-stage", "base.model=org/fine", "--gpu", "t4")
    assert offline.exit_code == 0 and "sizes from the Hub's cache (no network)" in offline.stdout
    assert "org/fine: the Hub cannot be reached; using the copy in the cache" in caplog.text
    unseen = tuna("plan", "two-stage", "base.model=org/unseen", "--gpu", "t4")
    assert unseen.exit_code == 2
    assert "error: org/unseen: the Hub cannot be reached, and the model is not in the cache" in unseen.stderr
    assert "HTTPS_PROXY" in unseen.stderr


@pytest.mark.parametrize("how", ["score", "judge"])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_teacher_or_judge_that_cannot_be_had_is_found_before_anything_trains(hub, tmp_path, command, how):  # noqa: F811
    setting = f"stages.contextual.data={json.dumps({**FEEDBACK, 'sample': {}, how: {'model': 'org/gated'}})}"
    more = ["--gpu", "t4"] if command == "plan" else ["--output", str(tmp_path / "run")]
    overrides = [setting, "stages.contextual.overflow=cut", "stages.sft.data.limit=8"]
    result = tuna(command, "quickstart", *overrides, *more)
    assert result.exit_code == 2, result.output
    assert f"error: stages.contextual.data.{how}.model (org/gated): the model is gated" in result.stderr
    assert "hf auth login" in result.stderr
    assert not (tmp_path / "run" / "stack").exists()


def test_a_card_that_nobody_knows():
    result = tuna("plan", "two-stage", "--gpu", "RTX 4095")
    assert result.exit_code == 2
    assert "error: --gpu: unknown GPU 'RTX 4095'\n  Did you mean 'RTX 4090'? Known: T4, " in result.stderr


def test_bf16_on_a_t4(monkeypatch, tmp_path):
    planned = tuna("plan", "two-stage", "base.dtype=bfloat16", "--gpu", "t4")
    ran = run_on(monkeypatch, tmp_path, Device.of(find_gpu("t4")), "stages.contextual.train.bf16=true")
    for result, key in ((planned, "base.dtype"), (ran, "stages.contextual.train.bf16")):
        assert result.exit_code == 2
        assert f"error: {key}: the T4 has no bf16, and `{key}` asks for it\n  Leave the key out" in result.stderr


def test_a_recipe_that_cannot_fit(monkeypatch, tmp_path):
    planned = tuna("plan", "two-stage", "base.model=meta-llama/Llama-2-13b-hf", "--gpu", "RTX 3070 8GB")
    assert planned.exit_code == 1
    lines = planned.stdout.partition("It does not fit: ")[2].splitlines()
    assert lines[0].endswith(" GiB needed of 7.70 GiB.")
    assert any("Unchanged, it fits on: " in line for line in lines)
    ran = run_on(monkeypatch, tmp_path, Device("small card", 5e6))
    assert ran.exit_code == 2
    assert "this cannot fit: " in ran.stderr and "small card has 0.00 GiB free" in ran.stderr
    assert "Take a smaller model or a larger GPU; `tuna-peft plan RECIPE --gpu all` shows which." in ran.stderr
    assert not (tmp_path / "run" / "stack").exists()


def test_what_is_assumed_of_data_that_is_not_here():
    sliced = [f"stages.contextual.data.split={part}" for part in ("train[:500]", "train[:10%]", "train[20000:]")]
    shown = ["500 prompts (train[:500] of 10,000)", "1,000 prompts (train[:10%] of 10,000)", "10,000 prompts of"]
    for override, words in zip(sliced, shown, strict=True):
        result = tuna("plan", "two-stage", override, "--gpu", "t4")
        assert f"contextual: assumed: {words}" in result.stdout
    wrong = tuna("plan", "two-stage", "stages.contextual.data.split=train[:half]", "--gpu", "t4")
    assert wrong.exit_code == 2 and "split `train[:half]` is not possible" in wrong.stderr
