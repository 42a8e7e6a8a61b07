"""Every option of `TrainingArguments`: it works in `TunaTrainer`, is refused by name, or is irrelevant."""

import dataclasses

import pytest
import torch
from families import make_rows
from tiny_trainer import config, stacked, trainer
from transformers import TrainingArguments

from tuna_peft.training.config import mixed_precision
from tuna_peft.training.options import REFUSED

# `Trainer`'s own code reads these, around the methods that `TunaTrainer` replaces; or `TunaTrainer` does.
WORKS = [
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules", "gradient_accumulation_steps",
    "max_grad_norm", "bf16", "fp16", "tf32", "activation_checkpointing", "activation_checkpointing_kwargs",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "neftune_noise_alpha", "torch_empty_cache_steps",
    "auto_find_batch_size", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
    "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "eval_strategy",
    "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start",
    "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics",
    "batch_eval_metrics", "save_only_model", "save_strategy", "save_steps", "save_on_each_node",
    "save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
    "hub_strategy", "hub_always_push", "hub_revision", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism",
    "seed", "data_seed", "use_cpu", "accelerator_config", "dataloader_drop_last", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "remove_unused_columns",
    "train_sampling_strategy", "length_column_name", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "deepspeed", "debug",
    "skip_memory_metrics",
]  # fmt: skip
# Refused elsewhere: `create_accelerator_and_postprocess` does it, because a launcher can ask for FSDP too.
REFUSED_LATER = ["fsdp", "fsdp_config"]
# For scripts that read them themselves, or set by the launcher: no trainer of transformers reads them.
IRRELEVANT = ["do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"]

BAD = {
    "label_smoothing_factor": 0.1,
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "average_tokens_across_devices": False,
    "logging_nan_inf_filter": False,
    "label_names": ["labels"],
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "parallelism_config": object(),
}


def test_every_option_is_in_one_class():
    classes = [WORKS, list(REFUSED), REFUSED_LATER, IRRELEVANT]
    named = [name for each in classes for name in each]
    assert len(named) == len(set(named))
    options = {field.name for field in dataclasses.fields(TrainingArguments)}
    # Other versions of transformers may lack some of them, and have new ones, which have to be looked at.
    assert not options - set(named), "look whether these have an effect on TunaTrainer"


@pytest.mark.parametrize("name", REFUSED)
def test_options_without_effect_are_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=.* is not supported by TunaTrainer"):
        config(tmp_path, **{name: BAD[name]})
    default = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}[name]
    config(tmp_path, **{name: default})  # a value that changes nothing is accepted


def test_inputs_for_metrics_are_refused(tmp_path):
    with pytest.raises(ValueError, match="include_for_metrics"):
        config(tmp_path, include_for_metrics=["loss", "inputs"])
    config(tmp_path, include_for_metrics=["loss"])


@pytest.mark.parametrize(
    "options",
    [
        {"neftune_noise_alpha": 5.0},
        {"max_grad_norm": 1e-6, "optim": "sgd"},
        {"weight_decay": 0.9},
        {"warmup_steps": 5},
        {"train_sampling_strategy": "sequential"},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_that_work_change_the_run(base_folder, tmp_path, options):
    """Some that pass through code of ours: each changes the losses that training logs."""
    logged = []
    for changed in ({}, options):
        run = trainer(stacked(base_folder), tmp_path, make_rows(12), max_steps=4, **changed)
        run.train()
        logged.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert logged[0] != logged[1]


def test_losses_reach_compute_metrics(base_folder, tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.losses)
        return {}

    run = trainer(stacked(base_folder), tmp_path, make_rows(6), include_for_metrics=["loss"],
                  per_device_eval_batch_size=2)  # fmt: skip
    run.compute_metrics = metrics
    run.evaluate()
    assert seen[0] is not None and len(seen[0]) == 6


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, (False, False)), ((7, 5), (False, True)), ((8, 0), (True, False)), ((9, 0), (True, False))],
)
def test_mixed_precision_of_every_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert mixed_precision() == expected
    assert mixed_precision(use_cpu=True) == (False, False)
