"""Trainers under DDP and DeepSpeed: what is refused, and what DeepSpeed is told. Its engine: tests/recipe."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from tuna_peft import UserError
from tuna_peft.training.engines import DataParallel, require_no_loss_scale, require_same_engine


def under_deepspeed(monkeypatch, stage, **args):
    """A trainer for which accelerate has DeepSpeed's configuration, with bf16 as transformers fills it in."""
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": args.get("bf16", False)}}
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)

    def create(self):
        self.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        self.is_deepspeed_enabled, self.is_fsdp_enabled = True, False

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
    trainer = DataParallel.__new__(DataParallel)
    trainer.args = SimpleNamespace(**{"bf16": False, "fp16": False, "deepspeed_plugin": plugin, **args})
    trainer.create_accelerator_and_postprocess()
    return trainer, config


def test_deepspeed_casts_no_weight(monkeypatch):
    _, config = under_deepspeed(monkeypatch, 2, bf16=True)
    assert not config["bf16"]["enabled"] and not config["fp16"]["enabled"]
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert config["zero_optimization"]["reduce_bucket_size"] * 4 <= 20e6  # bytes
    _, config = under_deepspeed(monkeypatch, 2)
    assert "torch_autocast" not in config


def test_only_zero2_exchanges_gradients_in_each_pass(monkeypatch):
    assert under_deepspeed(monkeypatch, 2)[0].exchanges_in_each_pass
    assert not under_deepspeed(monkeypatch, 1)[0].exchanges_in_each_pass


def test_engines_that_shard_a_stack_are_refused(monkeypatch):
    with pytest.raises(UserError, match="ZeRO-3"):
        under_deepspeed(monkeypatch, 3)


def test_fp16_is_refused_under_deepspeed_alone():
    require_no_loss_scale(SimpleNamespace(fp16=True, deepspeed_plugin=None))
    require_no_loss_scale(SimpleNamespace(fp16=False, deepspeed_plugin=object()))
    with pytest.raises(UserError, match="loss scale"):
        require_no_loss_scale(SimpleNamespace(fp16=True, deepspeed_plugin=object()))


def test_a_pass_before_the_last_one_ends_no_step():
    trainer = DataParallel.__new__(DataParallel)
    trainer.accelerator = Accelerator(cpu=True)
    with trainer.before_the_last_pass(model=None):
        assert not trainer.accelerator.sync_gradients
    assert trainer.accelerator.sync_gradients


def test_a_checkpoint_is_taken_up_by_the_engine_that_wrote_it(tmp_path):
    require_same_engine(tmp_path, 2, deepspeed=False)
    with pytest.raises(UserError, match="a run without DeepSpeed"):
        require_same_engine(tmp_path, 2, deepspeed=True)
    (tmp_path / "global_step4").mkdir()
    for rank in range(2):
        (tmp_path / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    require_same_engine(tmp_path, 2, deepspeed=True)
    for world_size, deepspeed in ((4, True), (2, False)):
        with pytest.raises(UserError, match="2 processes under DeepSpeed"):
            require_same_engine(tmp_path, world_size, deepspeed=deepspeed)


def test_deepspeeds_engine_leaves_no_hook_on_the_model():
    model = torch.nn.Linear(1, 1)
    hooks = model.register_forward_pre_hook(print), model.register_forward_hook(print)
    trainer = DataParallel.__new__(DataParallel)
    trainer.accelerator, trainer.callback_handler = Accelerator(cpu=True), SimpleNamespace()
    trainer.deepspeed = SimpleNamespace(module_forward_pre_hook=hooks[0], module_forward_post_hook=hooks[1])
    trainer.release_model(model)
    assert not model._forward_pre_hooks and not model._forward_hooks
