"""Training stops at the first loss that is not finite, and reports fp16 steps that are skipped."""

import types

import pytest
import torch
from families import make_rows
from tiny_trainer import stacked, trainer

from tuna_peft import UserError
from tuna_peft.training.finite import MOST_SKIPPED, SkippedSteps


def test_a_diverged_run_stops_at_once(base_folder, tmp_path):
    run = trainer(stacked(base_folder), tmp_path, make_rows(8), learning_rate=1e30, lr_scheduler_type="constant",
                  max_grad_norm=0.0)  # fmt: skip
    with pytest.raises(UserError) as error:
        run.train()
    assert run.state.global_step == 1
    assert "the loss is" in error.value.what and "in step 2 (learning rate 1e+30, largest gradient" in error.value.what
    assert "gradient norm of the last logged step" in error.value.what
    assert "Lower learning_rate" in error.value.fix and "fp16" not in error.value.fix


def test_one_nan_among_accumulated_batches_is_enough(base_folder, tmp_path, monkeypatch):
    run = trainer(stacked(base_folder), tmp_path, make_rows(8), per_device_train_batch_size=1,
                  gradient_accumulation_steps=4)  # fmt: skip
    compute, calls = run.compute_loss, []

    def third_is_nan(*args, **kwargs):
        calls.append(args)
        return compute(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(run, "compute_loss", third_is_nan)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    with pytest.raises(UserError, match=r"the loss is nan in step 1 .*largest gradient nan"):
        run.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.model.named_parameters())


def test_many_skipped_steps_in_a_row_are_reported(caplog):
    callback = SkippedSteps()
    for skipped in [True] * (MOST_SKIPPED - 1) + [False] + [True] * (MOST_SKIPPED - 1):
        callback.on_step_end(None, None, None, optimizer=types.SimpleNamespace(step_was_skipped=skipped))
    assert not caplog.text
    callback.on_step_end(None, None, None, optimizer=types.SimpleNamespace(step_was_skipped=True))
    assert f"the last {MOST_SKIPPED} optimizer steps were skipped" in caplog.text
