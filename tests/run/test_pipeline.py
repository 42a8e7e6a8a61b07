"""Whole runs on a tiny base: what they write, and that an interrupted run resumes to the same result."""

import json
import os
import random
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from logged_names import undocumented
from peft import PeftModel
from rounding import stack_kl_bound
from tiny_llama import write_base
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import tuna_peft.run.pipeline as pipeline_module
import tuna_peft.run.train_stage as train_stage_module
from tuna_peft import AdapterStack, TunaTrainer, UserError
from tuna_peft.models.base.load import load_base
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.exports import export_stack
from tuna_peft.run.folder import RunDirectory
from tuna_peft.run.pipeline import run_recipe
from tuna_peft.training.checkpoint import StopOnRequest
from tuna_peft.training.sft import StackSFTTrainer

TRAIN = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "steps",
         "save_steps": 2, "logging_steps": 1, "gradient_checkpointing": False}  # fmt: skip
STAGES = ["sft", "probabilistic", "contextual"]


def grade(record, response):
    """A grader for the tests: does the response have any word of the prompt?"""
    return float(bool(set(record["prompt"].split()) & set(response.split())))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, supervised data and ranked data."""
    root = tmp_path_factory.mktemp("files")
    write_base(root / "base")
    draw = random.Random(0)

    def words(n):
        return " ".join(f"w{draw.randrange(3, 90)}" for _ in range(n))

    ranked = [{"id": str(i), "prompt": words(4) + " ", "completions": [words(3), words(2), words(4)],
               "scores": [2.0, 1.0, 0.0]} for i in range(32)]  # fmt: skip
    (root / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    sft = [{"instruction": words(4), "input": "", "output": words(3)} for _ in range(32)]
    (root / "sft.json").write_text(json.dumps(sft))
    return root


def recipe(files, **changes):
    ranked = {"path": str(files / "ranked.jsonl")}
    values = {
        "name": "tiny",
        "base": {"model": str(files / "base"), "device": "cpu"},
        "prompt": {"template": "{instruction} "},
        "lora": {"r": 4, "alpha": 8},
        "stages": [
            {"name": "sft", "type": "sft", "data": {"path": str(files / "sft.json")}, "train": TRAIN},
            {"name": "probabilistic", "type": "ranking", "data": ranked, "train": TRAIN},
            {"name": "contextual", "type": "ranking", "data": ranked, "lora": {"r": 2}, "train": TRAIN},
        ],
        "evaluation": {"tasks": {"ranking": {**ranked, "split": "train[:8]"},
                                 "graded": {**ranked, "split": "train[:4]", "grader": "test_pipeline:grade",
                                            "max_new_tokens": 4}}},
        "export": {"divergence_prompts": 4},
    }  # fmt: skip
    return Recipe.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    """An uninterrupted run and its report."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, run_recipe(recipe(files), folder)


def adapter_bytes(folder):
    return {name: (folder / "stack" / name / "adapter_model.safetensors").read_bytes() for name in STAGES}


def test_report_has_base_and_every_stage(straight):
    folder, report = straight
    assert list(report["evaluation"]) == ["base", *STAGES]
    for tasks in report["evaluation"].values():
        accuracy, grade = tasks["ranking"]["metrics"]["pair_accuracy"], tasks["graded"]["metrics"]["grade"]
        assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1 and accuracy["count"] == 24
        assert 0 <= grade["value"] <= 1 and grade["count"] == 4
    for stage in report["stages"].values():
        assert stage["steps"] == 4 and stage["tokens"] > 0 and stage["seconds"] > 0 and stage["peak_memory_gib"] > 0
    assert report["environment"]["packages"]["peft"] and report["seed"] == 0
    assert json.loads((folder / "report.json").read_text()) == report
    for name in STAGES:
        assert (folder / "stages" / name / "curves.png").stat().st_size > 5000
    assert (folder / "run.log").stat().st_size > 0


def test_without_a_terminal_there_are_lines_and_no_carriage_returns(files, tmp_path, capfd):
    run_recipe(recipe(files), tmp_path / "run")
    printed, log = capfd.readouterr().err, (tmp_path / "run" / "run.log").read_text()
    assert "\r" not in printed + log and len(printed.splitlines()) < 40
    lines = printed.splitlines()
    for stage in STAGES:
        began = lines.index(next(line for line in lines if line.startswith(f"stage {stage}: ")))
        assert any(line.startswith(f"{stage}: 100% (4/4 steps) in ") for line in lines[began:])
        assert f"{stage}: step 1 of 4: loss=" in log and f"{stage}: step 1 of 4" not in printed
    assert "packed sequences match" in log and "attention" not in printed
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(one["stage"], one["step"]) for one in metrics if "loss" in one] == [
        (stage, step) for stage in STAGES for step in (1, 2, 3, 4)
    ]


def test_every_number_that_it_logs_and_measures_is_documented(straight):
    lines = (straight[0] / "metrics.jsonl").read_text().splitlines()
    tasks = [json.loads(file.read_text())["metrics"] for file in (straight[0] / "evaluation").glob("*/*.json")]
    names = {name for line in lines for name in json.loads(line)} | {name for task in tasks for name in task}
    assert {"mean_token_accuracy", "rank_loss", "pair_accuracy"} <= names
    assert undocumented(names) == []


def test_exports_load_without_tuna_peft_and_agree_with_the_unmerged_adapters(straight, files):
    folder, report = straight
    bound = stack_kl_bound(folder / "stack")
    assert report["exports"]["combined"]["divergence"]["kl_max"] <= bound
    # Weights of a wide random base rounded to bf16, and computed in fp32: the same everywhere.
    assert bound < report["exports"]["merged"]["divergence"]["kl_mean"] <= 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    live = AdapterStack.from_pretrained(folder / "stack", device="cpu")
    assert live.names == STAGES and live.prompt["template"] == "{instruction} "
    combined = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "base"), folder / "combined")
    assert merged(ids).logits.isfinite().all() and combined(ids).logits.isfinite().all()


def test_a_finished_run_is_not_repeated(straight, files, monkeypatch):
    folder, report = straight
    before = adapter_bytes(folder)
    monkeypatch.setattr("tuna_peft.run.pipeline.train_stage", lambda *args: pytest.fail("trained again"))
    again = run_recipe(recipe(files), folder)
    assert again == report and adapter_bytes(folder) == before


class Crash(TrainerCallback):
    """Crashes after a number of steps over all stages, like `kill -9`: nothing is saved on the way out."""

    def __init__(self, after):
        self.left = after

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("crash")


@pytest.mark.parametrize("after", [3, 7, 12])
def test_an_interrupted_run_resumes_to_the_same_bytes(straight, files, tmp_path, monkeypatch, after):
    crash = Crash(after)
    real = train_stage_module._trainer
    monkeypatch.setattr(train_stage_module, "_trainer", lambda *args: _with(real(*args), crash))
    with pytest.raises(RuntimeError, match="crash"):
        run_recipe(recipe(files), tmp_path / "run")
    monkeypatch.undo()
    report = run_recipe(recipe(files), tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(straight[0])
    resumed = [name for name, stage in report["stages"].items() if stage["resumed_from"]]
    assert resumed == [STAGES[(after - 1) // 4]]
    assert without_seconds(report["evaluation"]) == without_seconds(straight[1]["evaluation"])


def test_a_stage_killed_between_its_last_checkpoint_and_its_marker_is_not_trained_on(
    straight, files, tmp_path, monkeypatch
):
    """Nor do its figures become those of the process that only marks it."""
    copy = shutil.copytree(straight[0], tmp_path / "run")
    for marker in copy.glob("stages/*/done.json"):
        marker.unlink()
    for folder in ("combined", "merged"):
        shutil.rmtree(copy / folder)
    (copy / "exports.json").unlink()
    assert [len(list(folder.glob("checkpoint-*"))) for folder in copy.glob("stages/*")] == [1, 1, 1]
    monkeypatch.setattr(TunaTrainer, "training_step", lambda *_: pytest.fail("trained on"))
    monkeypatch.setattr(StackSFTTrainer, "training_step", lambda *_: pytest.fail("trained on"))
    report = run_recipe(recipe(files), copy)
    for name in ("stack/*/*", "combined/adapter*", "merged/model.safetensors"):
        for file in straight[0].glob(name):
            assert (copy / file.relative_to(straight[0])).read_bytes() == file.read_bytes()
    for name, stage in report["stages"].items():
        expected = straight[1]["stages"][name]
        assert stage["resumed_from"] == "checkpoint-4"
        same = ("steps", "epochs", "train_loss", "tokens", "trainable_parameters", "lora")
        assert {key: stage[key] for key in same} == {key: expected[key] for key in same}
    assert report["curves"] == straight[1]["curves"]


def without_seconds(evaluation):
    return {
        stage: {task: {**result, "seconds": None} for task, result in tasks.items()}
        for stage, tasks in evaluation.items()
    }


def _with(trainer, callback):
    trainer.add_callback(callback)
    return trainer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # Ctrl-C, and what schedulers send
def test_a_signal_saves_the_step_and_the_run_resumes_to_the_same_bytes(straight, files, tmp_path, monkeypatch, number):
    class Send(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(number)

    real, before = train_stage_module._trainer, [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(train_stage_module, "_trainer", lambda *args: _with(real(*args), Send()))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(files), tmp_path / "run")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.undo()
    assert (tmp_path / "run/stages/sft/checkpoint-3/trainer_state.json").exists()
    report = run_recipe(recipe(files), tmp_path / "run")
    assert report["stages"]["sft"]["resumed_from"] == "checkpoint-3"
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(straight[0])


def test_stop_on_request_only_when_requested():
    control = type("Control", (), {"should_save": False, "should_training_stop": False})()
    stop, args = StopOnRequest(), type("Args", (), {"world_size": 1})
    assert not stop.on_step_end(args, None, control).should_training_stop
    stop.requested = True
    assert stop.on_step_end(args, None, control).should_save and control.should_training_stop


def test_a_second_ctrl_c_interrupts_at_once_unless_a_launcher_repeats_the_first(monkeypatch):
    def press_twice(processes):
        monkeypatch.setattr(train_stage_module, "world_size", lambda: processes)
        with train_stage_module._stop_on_ctrl_c(stop := StopOnRequest()):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return stop.requested

    assert press_twice(processes=2)
    with pytest.raises(KeyboardInterrupt):
        press_twice(processes=1)


def test_a_changed_recipe_is_rejected_with_its_keys(straight, files):
    changed = recipe(files, seed=1, lora={"r": 8, "alpha": 8})
    with pytest.raises(UserError) as error:
        run_recipe(changed, straight[0])
    assert "another recipe" in str(error.value) and "seed" in str(error.value) and "lora.r" in str(error.value)


def test_a_folder_in_use_or_with_other_files_is_rejected(files, tmp_path):
    with RunDirectory(tmp_path / "run", recipe(files)), pytest.raises(UserError) as error:
        run_recipe(recipe(files), tmp_path / "run")
    assert error.value.what == f"the output directory is in use by another run (process {os.getpid()})"
    with RunDirectory(tmp_path / "run", recipe(files)):
        pass  # released
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files"):
        run_recipe(recipe(files), tmp_path / "other")
    with pytest.raises(UserError, match="not a folder"):
        run_recipe(recipe(files), tmp_path / "other" / "thesis.tex")


def test_a_stage_with_changed_weights_is_rejected(straight, files, tmp_path):
    copy = shutil.copytree(straight[0], tmp_path / "run")
    weights = copy / "stack" / "sft" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="hash differs"):
        run_recipe(recipe(files), copy)


@pytest.mark.parametrize("method", ["fp4", "int8", "none"])
def test_other_quantizations_run(files, tmp_path, method):
    one = recipe(files).stages[1:2]
    report = run_recipe(
        recipe(files, quantization={"method": method}, stages=[stage.model_dump() for stage in one]), tmp_path / "run"
    )
    assert report["base"]["quantization"]["method"] == method
    assert report["exports"]["combined"]["divergence"]["kl_max"] <= stack_kl_bound(tmp_path / "run" / "stack")
    assert torch.isfinite(torch.tensor(report["stages"]["probabilistic"]["train_loss"]))


def test_the_model_is_freed_before_exports_are_measured(files, tmp_path, monkeypatch):
    """A merged model in 16 bits needs the memory that the 4-bit base of training held."""
    loaded, load = [], pipeline_module.load_base

    def load_and_watch(*args, **kwargs):
        base = load(*args, **kwargs)
        loaded.append(weakref.ref(base.model))
        return base

    def export(run, inputs):
        assert [model() for model in loaded] == [None]
        return export_stack(run, inputs)

    monkeypatch.setattr(pipeline_module, "load_base", load_and_watch)
    monkeypatch.setattr(pipeline_module, "export_stack", export)
    report = run_recipe(recipe(files), tmp_path / "run")
    assert len(report["stages"]) == 3 and {"combined", "merged"} <= report["exports"].keys()


def test_every_stage_trains_in_mixed_precision_and_undoes_it_afterwards(files, tmp_path, monkeypatch):
    """Nor does it keep its optimizer states: evaluation and the next stage need that memory."""
    train, released, autocast, left = train_stage_module.train_stage, train_stage_module._released, [], []

    def watched(model, *args):
        layer = (model.get_base_model() if isinstance(model, PeftModel) else model).model.layers[0]
        autocast.append(set())
        layer.register_forward_pre_hook(lambda *_: autocast[-1].add(torch.is_autocast_enabled("cpu")))
        return train(model, *args)

    def released_and_watched(trainer, model):
        optimizer, states = weakref.ref(trainer.optimizer.optimizer), len(trainer.optimizer.state)
        model = released(trainer, model)
        left.append((states > 0, optimizer(), "forward" in vars(model) and "autocast" in str(model.forward)))
        return model

    monkeypatch.setattr(pipeline_module, "train_stage", watched)
    monkeypatch.setattr(train_stage_module, "_released", released_and_watched)
    stages = recipe(files).model_dump()["stages"]
    stages = [{**stage, "train": {**stage["train"], "bf16": True, "max_steps": 1}} for stage in stages]
    changes = {"evaluation": None, "export": {"combine": False, "merge": {"enabled": False}}, "stages": stages}
    run_recipe(recipe(files, **changes), tmp_path / "run")
    assert autocast == [{True}] * 3 and left == [(True, None, False)] * 3


def test_bad_data_of_a_late_stage_stops_before_anything_trains(files, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "w1 ", "completions": ["w2"], "scores": [1]}\n')
    stages = [stage.model_dump() for stage in recipe(files).stages]
    stages[2]["data"]["path"] = str(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="bad.jsonl: line 1"):
        run_recipe(recipe(files, stages=stages), tmp_path / "run")
    assert not (tmp_path / "run" / "stack").exists()
    stages[2]["data"]["path"] = str(files / "ranked.jsonl")  # corrected: the folder is still good
    with RunDirectory(tmp_path / "run", recipe(files, stages=stages)):
        pass


def test_a_grader_that_does_not_exist_stops_before_anything_is_loaded(files, tmp_path, monkeypatch):
    monkeypatch.setattr("tuna_peft.run.pipeline.load_base", lambda *args, **kwargs: pytest.fail("loaded"))
    evaluation = {"tasks": {"graded": {"path": str(files / "ranked.jsonl"), "grader": "test_pipeline:grad"}}}
    with pytest.raises(UserError, match="no grader 'test_pipeline:grad'"):
        run_recipe(recipe(files, evaluation=evaluation), tmp_path / "run")


def test_another_base_rejects_the_adapters_of_a_run(straight, tmp_path):
    other = write_base(Path(tmp_path) / "other", seed=1)
    with pytest.raises(UserError, match="trained on"):
        AdapterStack.from_pretrained(straight[0] / "stack", base=load_base(other, device="cpu"))
