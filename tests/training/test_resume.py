"""Training that is interrupted and resumed equals training without an interruption, in weights, sums and logs."""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import make_rows
from test_trainer import StopAfter
from tiny_trainer import stacked, trainer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig

from tuna_peft import UserError
from tuna_peft.models.stack.adapters import fingerprint
from tuna_peft.training.resume import checkpoints, latest_checkpoint
from tuna_peft.training.sft import StackSFTTrainer

# 6 steps an epoch. No two of the intervals agree, so that a checkpoint falls between two logs.
STEPS = {"max_steps": 11, "save_strategy": "steps", "save_steps": 2, "logging_steps": 5}
EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "logging_steps": 5}
MIXED = {
    "max_steps": -1,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_strategy": "epoch",
}
SCHEDULES = pytest.mark.parametrize("settings", [STEPS, EPOCHS, MIXED], ids=["steps", "epochs", "mixed"])


def tuna(base_folder, folder, settings, callbacks=None):  # noqa: F811
    return trainer(
        stacked(base_folder), folder, make_rows(12), callbacks, save_total_limit=2, lr_scheduler_type="constant",
        **settings,
    )  # fmt: skip


def sft(base_folder, folder, settings, callbacks=None):  # noqa: F811
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 32)}
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), eos_token="</s>", pad_token="<unk>"
    )
    rows = [{"input_ids": [5 + i, 6, 7 + i, 2][: 3 + i % 2], "completion_mask": [0, 1, 1, 1][: 3 + i % 2]}
            for i in range(12)]  # fmt: skip
    config = SFTConfig(
        str(folder), per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True,
        report_to="none", bf16=False, disable_tqdm=True, dataloader_pin_memory=False, save_total_limit=2,
        completion_only_loss=True, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    return StackSFTTrainer(
        stacked(base_folder), config, train_dataset=Dataset.from_list(rows), processing_class=tokens,
        callbacks=callbacks,
    )  # fmt: skip


KINDS = pytest.mark.parametrize("make", [tuna, sft])


def history(run):
    """What was logged, without times."""
    times = ("runtime", "per_second", "flos")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in times)}
        for entry in run.state.log_history
    ]


def figures(run, result):
    tokens = getattr(run, "_total_train_tokens", run.state.num_input_tokens_seen)
    return [run.state.global_step, run.state.epoch, result.training_loss, tokens, history(run)]


class Times(TrainerCallback):
    """Counts optimizer steps."""

    def __init__(self):
        self.steps = 0

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps += 1


@KINDS
@SCHEDULES
def test_every_figure_of_a_resumed_training_is_that_of_the_whole(base_folder, tmp_path, make, settings):  # noqa: F811
    straight = make(base_folder, tmp_path / "straight", settings)
    expected = figures(straight, straight.train())
    assert expected[3] > 0 and expected[2] > 0
    for step in (4, 7, 9):
        with pytest.raises(KeyboardInterrupt):
            make(base_folder, tmp_path / "cut", settings, [StopAfter(step)]).train(
                resume_from_checkpoint=(latest_checkpoint(tmp_path / "cut") or None) and True
            )
    resumed = make(base_folder, tmp_path / "cut", settings)
    result = resumed.train(resume_from_checkpoint=True)
    assert fingerprint(resumed.model, "one") == fingerprint(straight.model, "one")
    assert figures(resumed, result) == expected


def test_on_a_bf16_base_adapters_train_in_fp32_and_resume_to_the_same_bytes(base_folder, tmp_path):  # noqa: F811
    def make(folder, callbacks=None):
        model = stacked(base_folder, dtype=torch.bfloat16)
        return trainer(model, folder, make_rows(12), callbacks, save_total_limit=2, **STEPS)

    straight = make(tmp_path / "straight")
    before = fingerprint(straight.model, "one")
    loss = straight.train().training_loss
    adapters = [parameter for parameter in straight.model.parameters() if parameter.requires_grad]
    assert math.isfinite(loss) and fingerprint(straight.model, "one") != before
    assert straight.model.dtype == torch.bfloat16 and {one.dtype for one in adapters} == {torch.float32}
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", [StopAfter(5)]).train()
    resumed = make(tmp_path / "cut")
    assert resumed.train(resume_from_checkpoint=True).training_loss == loss
    assert fingerprint(resumed.model, "one") == fingerprint(straight.model, "one")


@KINDS
@SCHEDULES
def test_a_training_resumed_at_its_end_takes_no_step(base_folder, tmp_path, make, settings):  # noqa: F811
    """As after a kill between the last checkpoint and the file that marks the stage as done."""
    straight = make(base_folder, tmp_path, settings)
    expected = figures(straight, straight.train())
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for resume in (True, str(latest_checkpoint(tmp_path))):
        steps = Times()
        again = make(base_folder, tmp_path, settings, [steps])
        result = again.train(resume_from_checkpoint=resume)
        assert steps.steps == 0
        assert fingerprint(again.model, "one") == fingerprint(straight.model, "one")
        assert figures(again, result) == expected
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_seconds_and_peak_memory_add_up(base_folder, tmp_path):  # noqa: F811
    tuna(base_folder, tmp_path, STEPS).train()
    state = latest_checkpoint(tmp_path) / "trainer_state.json"
    values = json.loads(state.read_text())
    [sums] = values["stateful_callbacks"]["tuna_peft"]
    assert 0 < sums["seconds"] < 1000 and 0 < sums["peak_memory"] < 1 << 50
    sums |= {"seconds": 1000.0, "peak_memory": 1 << 50}
    state.write_text(json.dumps(values))
    again = tuna(base_folder, tmp_path, STEPS)
    metrics = again.train(resume_from_checkpoint=True).metrics
    assert 1000 < again.totals.seconds() < 2000 and again.totals.peak_memory() == 1 << 50
    assert 1000 < metrics["train_runtime"] < 2000
    assert metrics["train_steps_per_second"] == pytest.approx(11 / metrics["train_runtime"], abs=1e-3)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    """Changes one bit of the data, which only a checksum shows."""
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[largest.header_offset + 30 + len(largest.filename) + 100 + largest.file_size // 2] ^= 1
    file.write_bytes(data)


DAMAGES = [
    ("optimizer.pt", cut), ("optimizer.pt", Path.unlink), ("optimizer.pt", lambda file: file.write_bytes(b"")),
    ("optimizer.pt", flip), ("scheduler.pt", cut), ("scheduler.pt", Path.unlink), ("rng_state.pth", cut),
    ("rng_state.pth", Path.unlink), ("one/adapter_model.safetensors", cut),
    ("one/adapter_model.safetensors", Path.unlink), ("one/adapter_config.json", Path.unlink), ("stack.json", cut),
    ("stack.json", Path.unlink), ("one", shutil.rmtree),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(base_folder, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("trained")
    tuna(base_folder, folder, STEPS).train()
    return folder


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(trained, tmp_path, name, damage, caplog):
    folder = shutil.copytree(trained, tmp_path / "run")
    newest, before = checkpoints(folder)
    assert (newest.name, before.name) == ("checkpoint-11", "checkpoint-10")  # 9 as text
    assert latest_checkpoint(folder) == newest
    damage(newest / name)
    assert latest_checkpoint(folder) == before
    assert "checkpoint-11 is damaged" in caplog.text and "resuming from checkpoint-10" in caplog.text
    damage(before / name)
    with pytest.raises(UserError, match="checkpoint-11 is damaged.*checkpoint-10 is damaged") as error:
        latest_checkpoint(folder)
    assert error.value.where == str(folder) and "Delete" in error.value.fix


def test_the_trainer_names_a_damaged_checkpoint_or_takes_the_one_before(base_folder, trained, tmp_path):  # noqa: F811
    folder = shutil.copytree(trained, tmp_path / "run")
    newest, before = checkpoints(folder)
    cut(newest / "optimizer.pt")
    run = tuna(base_folder, folder, STEPS)
    with pytest.raises(UserError, match="damaged: optimizer.pt") as error:
        run.train(resume_from_checkpoint=str(newest))
    assert error.value.where == str(newest)
    steps = Times()
    run = tuna(base_folder, folder, STEPS, [steps])
    assert math.isfinite(run.train(resume_from_checkpoint=True).training_loss) and steps.steps == 1
    assert latest_checkpoint(folder) == newest  # written anew


def test_other_folders_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-20", "checkpoint-100", "checkpoint-7-old", "checkpoint-", "checkpoint-3"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-3"]
    assert latest_checkpoint(tmp_path) is None  # none is complete
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_an_output_folder_that_is_deleted_stops_training_at_its_next_checkpoint(base_folder, tmp_path):  # noqa: F811
    class Delete(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                shutil.rmtree(args.output_dir)

    with pytest.raises(UserError, match="deleted during training"):
        tuna(base_folder, tmp_path / "run", STEPS, [Delete()]).train()


def test_a_checkpoint_is_flushed_to_disk(base_folder, tmp_path, monkeypatch):  # noqa: F811
    """The one before is deleted in the end; without a flush, a power failure could leave neither."""
    flushed, real = set(), os.fsync

    def fsync(file):
        flushed.add(os.readlink(f"/proc/self/fd/{file}"))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    tuna(base_folder, tmp_path, {**STEPS, "max_steps": 1}).train()
    written = [path for path in latest_checkpoint(tmp_path).rglob("*") if path.is_file()]
    assert len(written) > 5 and {str(path) for path in written} <= flushed
