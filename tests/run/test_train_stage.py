"""The trainer's configuration for GPUs that this machine does not have."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.resolved import resolve_stages
from tuna_peft.run.train_stage import stage_config
from tuna_peft.training.totals import Totals


@pytest.mark.parametrize(
    ("capability", "bf16"),
    [
        ((7, 0), False),
        ((7, 5), False),
        ((8, 0), True),
        ((8, 6), True),
        ((8, 9), True),
        ((9, 0), True),
        ((12, 0), True),
    ],
)
@pytest.mark.parametrize("recipe", ["t4-16gb", "paper/tuna-llama-7b"])
def test_a_stage_uses_one_of_two_gpus_in_a_precision_that_it_supports(recipe, capability, bf16, tmp_path, monkeypatch):
    """Kaggle lends two T4s: `Trainer` would spread the model over both by nn.DataParallel, which TRL refuses."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: bf16)
    loaded = load_recipe(recipe, missing=True)
    for stage in resolve_stages(loaded):
        config = stage_config(loaded, stage, tmp_path, on_cpu=False)
        assert config.n_gpu == 1 and config.train_batch_size == config.per_device_train_batch_size
        assert (config.bf16, config.fp16) == (bf16, not bf16)
        assert config.dataloader_pin_memory and str(config.device) == "cuda:0"


def test_a_run_on_the_cpu_leaves_a_gpu_alone(monkeypatch):
    def touched(*_):
        raise AssertionError("the GPU was asked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, touched)
    arguments = SimpleNamespace(device=torch.device("cpu"))
    totals = Totals(SimpleNamespace(args=arguments))
    totals.on_train_begin(arguments, TrainerState(), None)
    assert totals.peak_memory() > 0
