"""Peak memory of the phases of a run, simulated on PyTorch's `meta` device at full size without weights.

The real code runs: TRL's supervised step with the trainer's patches, scoring, and generation. Every function returns
peak bytes beyond the model's parameters.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from benchmarks import ours
from benchmarks.flops import Counted, counted
from benchmarks.memory import LiveBytes
from benchmarks.meta import meta_step
from benchmarks.shapes import set_checkpointing
from benchmarks.trl_pairs import _Accelerator
from benchmarks.workloads import Group
from tuna_peft.models.forward.scoring import response_logps
from tuna_peft.models.generation.choose import chooser
from tuna_peft.models.generation.generate import _Decoder, _Sequence


def supervised(model: Any, lengths: Sequence[int], *, recompute: bool, targets: int) -> tuple[int, Counted]:
    """A training step as `StackSFTTrainer` computes it, over one example of each length, and its FLOPs.

    Args:
        targets: Tokens with a loss in each example.
    """
    trainer = _sft_trainer(model)
    set_checkpointing(model, recompute)
    rows = [{"input_ids": [3] * n, "labels": [-100] * (n - targets) + [3] * targets} for n in lengths]
    batch = _on_meta(DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=8)(rows))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with _triton_kernels(), meta_step(len(set(lengths)) == 1):
            trainer.compute_loss(model, dict(batch), num_items_in_batch=len(lengths) * targets).backward()

    with counted() as flops:
        step()
    with LiveBytes([*_known(model), *(p.grad for p in parameters), *batch.values()]) as live:  # type: ignore[misc]
        step()
    return live.peak, flops


def scoring(model: Any, groups: list[Group]) -> int:
    """Log-probabilities of the responses of some groups, without gradients."""
    batch = ours.to_meta(ours.batch_of(groups))
    model.eval()
    with LiveBytes([*_known(model), *vars(batch).values()]) as live, torch.no_grad(), meta_step(True):
        response_logps(model, batch)
    return live.peak


def generation(model: Any, lengths: Sequence[int], *, n: int, new: int, greedy: bool, top_p: float = 1.0) -> int:
    """`n` responses of `new` tokens to prompts of these lengths, until those to the longest prompts have ended."""
    model.eval()
    tokenizer: Any = SimpleNamespace(eos_token_id=None, pad_token_id=0)
    decoder = _Decoder(model, tokenizer, chooser(0.0 if greedy else 1.0, top_p), new)
    decoder.context = max(lengths) + new
    decoder.max_new_tokens = 2 * new
    batch = [_Sequence(prompt, sample, sample) for prompt in range(len(lengths)) for sample in range(n)]
    with LiveBytes(_known(model)) as live, torch.no_grad(), meta_step(False):
        for sequence, _ in decoder.run([[3] * length for length in lengths], batch, len(batch)):
            if lengths[sequence.prompt] < max(lengths):
                break  # the longest have left the batch, so the peak is behind
    return live.peak


def logits(model: Any, tokens: int) -> int:
    """All logits of a text, as the comparison of exports computes them."""
    model.eval()
    ids = torch.full((1, tokens), 3, device="meta")
    with LiveBytes([*_known(model), ids]) as live, torch.no_grad(), meta_step(True):
        model(input_ids=ids)
    return live.peak


def _known(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _on_meta(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to("meta") for key, value in batch.items()}


def _sft_trainer(model: Any) -> Any:
    """An `SFTTrainer` that can `compute_loss`; its constructor would require a tokenizer and a data set."""
    trainer: Any = SFTTrainer.__new__(SFTTrainer)
    trainer.args = SimpleNamespace(loss_type="nll", average_tokens_across_devices=False)
    trainer.aux_loss_enabled = False
    trainer.compute_loss_func = trainer.label_smoother = None
    trainer.model, trainer.accelerator = model, _Accelerator("meta")
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    base = model.get_base_model()
    if not getattr(base, "_benchmark_fused_head", False):
        trl_utils.add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        base._benchmark_fused_head = True
    return trainer


class _Kernel:
    """Replaces a Triton kernel, which works in place and allocates nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b` as on a GPU, which accumulates 16-bit products in fp32 without copies."""
    total.addmm_(a, b)  # `meta` accepts mixed dtypes


@contextlib.contextmanager
def _triton_kernels() -> Iterator[None]:
    """TRL's fused head as on a GPU: only tokens with a loss, with tiles reduced inside a kernel."""
    with (
        mock.patch.object(chunked_logprob, "_use_triton", lambda device: True),
        mock.patch.object(trl_utils, "_use_triton", lambda device: True),
        mock.patch.object(chunked_logprob, "_forward_kernel", _Kernel()),
        mock.patch.object(chunked_logprob, "_backward_kernel", _Kernel()),
        mock.patch.object(chunked_logprob, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)), create=True),
        mock.patch.object(chunked_logprob, "_addmm_fp32", _add_product),
    ):
        yield
