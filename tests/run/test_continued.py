"""One adapter through all stages: where each stage starts, what the stack has, and that a crash changes nothing."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from test_pipeline import TRAIN, Crash, _with, files, recipe  # noqa: F401 - files is a fixture

import tuna_peft.run.train_stage as train_stage_module
from tuna_peft import AdapterStack
from tuna_peft.models.stack.adapters import adapter_names, fingerprint
from tuna_peft.run.pipeline import run_recipe

STAGES = ["sft", "probabilistic", "contextual"]


def continued(files, **train):  # noqa: F811
    """SFT with an adapter that the first ranking stage continues; the last stage has an adapter of its own."""
    stages = [stage.model_dump() for stage in recipe(files).stages]
    for stage in stages:
        stage["train"] = {**TRAIN, "learning_rate": "auto", "save_steps": 1, "max_steps": 2}
    stages[1]["continue_adapter"] = True
    stages[2]["lora"]["start"] = "below"
    stages[2]["train"] |= train
    return recipe(files, stages=stages)


BELOW = {"reference": "below", "loss_type": "logistic", "margin": 0.0, "length_penalty": 0.0, "beta": 0.1}


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):  # noqa: F811
    folder, starts, real = tmp_path_factory.mktemp("runs") / "run", {}, train_stage_module._trainer

    def spy(model, config, *args):
        names = adapter_names(model)
        moved = any(p.any() for key, p in model.named_parameters() if f"lora_B.{names[-1]}" in key)
        starts[names[-1]] = names, fingerprint(model, names[-1]), moved
        return real(model, config, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage_module, "_trainer", spy)
        report = run_recipe(continued(files, **BELOW), folder)
    return folder, report, starts


def test_a_ranking_stage_continues_the_adapter_of_the_supervised_one(straight):
    folder, report, starts = straight
    assert [starts[name][0] for name in STAGES] == [["sft"], ["probabilistic"], ["probabilistic", "contextual"]]
    first = AdapterStack.from_pretrained(folder, device="cpu", upto="probabilistic")
    assert first.names == ["probabilistic"]
    kept = (folder / "stack/sft/adapter_model.safetensors").read_bytes()
    assert kept != (folder / "stack/probabilistic/adapter_model.safetensors").read_bytes()
    assert AdapterStack.from_pretrained(folder, device="cpu").names == ["probabilistic", "contextual"]
    # B is zero, then continued, then starts from the stack below.
    assert [starts[name][2] for name in STAGES] == [False, True, True]
    # The base is 64 wide; the last stage is on log-ratios.
    chosen = {name: report["stages"][name]["auto_learning_rate"] for name in STAGES}
    assert chosen == {"sft": 7.4e-3, "probabilistic": 2.5e-3, "contextual": 3.7e-4}


def test_it_starts_from_the_saved_weights(straight, tmp_path):
    from tuna_peft.models.base.load import load_base, make_quantization_config
    from tuna_peft.models.stack.adapters import load_adapter
    from tuna_peft.models.stack.manifest import read_manifest

    folder, _, starts = straight
    base = read_manifest(folder / "stack").base["model"]
    model = load_base(base, device="cpu", quantization_config=make_quantization_config("nf4")).model
    saved = load_adapter(model, "saved", folder / "stack/sft")
    assert fingerprint(saved, "saved") == starts["probabilistic"][1]


def test_a_crash_in_the_continued_stage_changes_nothing(straight, files, tmp_path, monkeypatch):  # noqa: F811
    folder, real = tmp_path / "run", train_stage_module._trainer

    def crashing(model, *args):
        trainer = real(model, *args)
        return _with(trainer, Crash(2)) if adapter_names(model)[-1] == "probabilistic" else trainer

    monkeypatch.setattr(train_stage_module, "_trainer", crashing)
    with pytest.raises(RuntimeError, match="crash"):
        run_recipe(continued(files, **BELOW), folder)
    monkeypatch.undo()
    report = run_recipe(continued(files, **BELOW), folder)
    assert report["stages"]["probabilistic"]["resumed_from"]
    for name in ("stack.json", *(f"{stage}/adapter_model.safetensors" for stage in STAGES)):
        assert (folder / "stack" / name).read_bytes() == (straight[0] / "stack" / name).read_bytes(), name


def test_stages_that_cannot_continue(files):  # noqa: F811
    stages = [stage.model_dump() for stage in recipe(files).stages]

    def changed(index, **changes):
        return recipe(files, stages=[{**each, **changes} if i == index else each for i, each in enumerate(stages)])

    with pytest.raises(ValidationError, match="`sft` has `continue_adapter`: it needs a stage before it"):
        changed(0, continue_adapter=True)
    with pytest.raises(ValidationError, match="`contextual` continues the adapter of `probabilistic`"):
        changed(2, continue_adapter=True)  # r is 2 there
    with pytest.raises(ValidationError, match="lacks what the adapter learnt"):
        changed(1, continue_adapter=True, train={"reference": "below"})
