"""Trainers under DDP and DeepSpeed: rejected configurations, and the settings that DeepSpeed gets.

Training with its real engine is tested in tests/run/test_processes.py.
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from transformers import Trainer

from tuna_peft import UserError
from tuna_peft.training.engines import DataParallel, require_fitting_deepspeed, require_same_engine

DEFAULTS = {"bf16": False, "fp16": False, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0}


def under_deepspeed(monkeypatch, stage, **args):
    """A trainer under a launcher configured for bf16, and the final configuration of DeepSpeed."""
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config, get_value=config.get)

    def create(self):
        assert config["bf16"]["enabled"] == self.args.bf16  # else transformers refuses it
        self.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        self.is_deepspeed_enabled, self.is_fsdp_enabled = True, False

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
    trainer = DataParallel.__new__(DataParallel)
    trainer.args = SimpleNamespace(**{**DEFAULTS, "deepspeed_plugin": plugin, **args})
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


@pytest.mark.parametrize(
    ("config", "args", "named"),
    [
        ({}, {"fp16": True}, "loss scale"),
        (
            {"gradient_accumulation_steps": 1},
            {"gradient_accumulation_steps": 8},
            "Set gradient_accumulation_steps: auto in",
        ),
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 1.0}, "Set gradient_clipping: auto"),
    ],
)
def test_conflicts_with_deepspeeds_configuration(config, args, named):
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": "auto"})
    plugin.hf_ds_config.config.update(config)
    require_fitting_deepspeed(SimpleNamespace(**{**DEFAULTS, **args}, deepspeed_plugin=None))
    with pytest.raises(UserError, match=named):
        require_fitting_deepspeed(SimpleNamespace(**{**DEFAULTS, **args}, deepspeed_plugin=plugin))


def test_configurations_without_conflict():
    file = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4, "gradient_clipping": "auto"}
    plugin = DeepSpeedPlugin(hf_ds_config=file)
    args = {**DEFAULTS, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
    assert require_fitting_deepspeed(SimpleNamespace(**args, deepspeed_plugin=plugin)) is None


def test_accumulating_gradients_does_not_end_the_step():
    trainer = DataParallel.__new__(DataParallel)
    trainer.accelerator = Accelerator(cpu=True)
    with trainer.accumulate_gradients(model=None):
        assert not trainer.accelerator.sync_gradients
    assert trainer.accelerator.sync_gradients


def test_a_checkpoint_resumes_only_with_the_engine_that_wrote_it(tmp_path):
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
