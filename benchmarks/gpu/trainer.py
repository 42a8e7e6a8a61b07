"""`TunaTrainer` for some steps at growing passes: time and memory beside the plan."""

from __future__ import annotations

import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.flops import limit
from benchmarks.gpu.steps import Arms, Setting
from benchmarks.planner import PRECISION, adapter_of
from benchmarks.ranking_step import peak_flops
from benchmarks.shapes import build, config_of
from benchmarks.workloads import response_tokens
from tuna_peft import TunaConfig, TunaTrainer
from tuna_peft.models.base.memory import free_memory
from tuna_peft.planning.plan import training
from tuna_peft.planning.shapes import ModelShape
from tuna_peft.planning.spec import Device, RunSpec, StageSpec
from tuna_peft.planning.workload import Row, Workload

WARM_UP = 3  # steps; after the first one, `activation_memory: auto` keeps activations


def arms(setting: Setting) -> Arms:
    """By the number of tokens in a forward pass."""
    passes = (600, 1200) if setting.toy else (2048, 8192, 16_384)
    return {f"{tokens} tokens a pass": lambda tokens=tokens: train(setting, tokens) for tokens in passes}  # type: ignore[misc]


def train(setting: Setting, tokens: int) -> dict[str, Any]:
    """Steps of twelve groups (a trial: four), in passes of at most `tokens` tokens."""
    steps, size = (5, 4) if setting.toy else (20, 12)
    cuda = setting.device == "cuda"
    config = config_of(setting.shape)
    groups = setting.workload.groups(size, config.vocab_size)
    model = build(setting.shape, setting.device)
    free_memory()
    if cuda:  # the peak of training alone: the 16-bit weights before quantization take more
        torch.cuda.reset_peak_memory_stats()
    clock = _Clock(cuda)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TunaTrainer(
            model,
            TunaConfig(
                folder, per_device_train_batch_size=size, max_tokens_per_batch=tokens, max_steps=steps, bf16=cuda,
                use_cpu=not cuda, activation_memory="auto", report_to="none", save_strategy="no", logging_steps=1,
                disable_tqdm=True, optim="adamw_torch",
            ),
            train_dataset=Dataset.from_list(groups),
            processing_class=_Tokenizer(),
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = statistics.median(clock.seconds[WARM_UP:])
    useful = limit(config, groups) / seconds / peak_flops(setting.device)
    return {
        "seconds": clock.seconds,
        "median_seconds": seconds,
        "groups_per_second": size / seconds,
        "response_tokens_per_second": response_tokens(groups) / seconds,
        "useful_utilization": useful,
        "losses": losses,
        "measured": _memory() if cuda else {},
        "planned": _planned(setting, config, groups, tokens),
    }


class _Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self._now() - self._started)

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class _Tokenizer(SimpleNamespace):
    """The attributes that the trainer uses when rows are tokenized already."""

    pad_token_id, eos_token_id = 0, 2
    model_input_names = ("input_ids",)

    def save_pretrained(self, folder: str) -> None:
        """Nothing to save."""


def _memory() -> dict[str, int]:
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "free": free,
        "total": total,
    }


def _planned(setting: Setting, config: Any, groups: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """The same bytes by the planner, on a device with this one's memory."""
    shape = ModelShape.from_config(config.to_dict(), setting.shape)
    rows = tuple(Row(len(group["prompt_ids"]), tuple(map(len, group["completions_ids"]))) for group in groups)
    stage = StageSpec(
        "benchmark", "ranking", Workload(rows, len(rows), "random"), adapter_of(shape), len(rows), 1, tokens, "auto",
        "adamw_torch", 1.0, 20,
    )  # fmt: skip
    cuda = setting.device == "cuda"
    memory = torch.cuda.mem_get_info()[1] if cuda else 16 * 2**30
    phase = training(RunSpec(setting.shape, shape, PRECISION, (stage,)), 0, Device("", float(memory), cuda=cuda))
    return {"allocated": phase.allocated, "peak": phase.peak, "parts": phase.parts, "note": phase.note}
