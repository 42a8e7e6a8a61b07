"""`TunaConfig`: the arguments of `TunaTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import torch
from transformers import SchedulerType, TrainingArguments

from tuna_peft.data.config import Overflow
from tuna_peft.limits import is_ampere_or_later


@dataclass
class TunaConfig(TrainingArguments):
    r"""
    Configuration class for `TunaTrainer`.

    Holds only the parameters that are specific to Tuna, or whose default differs; for all others see
    `transformers.TrainingArguments`.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `tuna_peft.load_base` (`revision`, `dtype`, `device`, `trust_remote_code`,
            `attn_implementation`), used when the `model` argument of the trainer is a string.
        adapter_name (`str`, *optional*, defaults to `"tuna"`):
            Name of the adapter made from `peft_config`; on a `PeftModel` it becomes the next of the stack.

        > Parameters that control the data preprocessing

        max_length (`int` or `None`, *optional*, defaults to `1024`):
            Longest prompt plus one response, in tokens; `None` for no limit.
        overflow (`str`, *optional*, defaults to `"error"`):
            What to do with a response that passes `max_length`: `"error"`, `"cut"` its end, or `"skip"` it (and the
            row when fewer than two ranks are left).

        > Parameters that control memory

        max_tokens_per_batch (`int`, *optional*):
            Most tokens of one forward pass, padding included; the prompts of a batch are split to fit, like lengths
            together. The loss does not change: it is averaged over all prompts of the step.
        activation_memory (`str` or `float`, *optional*, defaults to `"auto"`):
            Which layers keep their activations instead of recomputing them in the backward pass: as many as fit into
            so many GiB, into what the device has left (`"auto"`), all (`"full"`, which `gradient_checkpointing=False`
            also means) or none (`"none"`). Memory and time change, results do not.

        > Parameters that control the loss

        loss_type (`str`, *optional*, defaults to `"hinge"`):
            `"hinge"` is Tuna's loss; `"logistic"` puts SimPO's loss (https://huggingface.co/papers/2405.14734) over
            all pairs of a list; `"list_mle"` is the Plackett-Luce likelihood of the order (ListMLE, Xia et al. 2008).
            See `tuna_peft.training.loss.RankingLoss`.
        beta (`float`, *optional*, defaults to `2.0`):
            Inverse temperature of `"logistic"` and `"list_mle"`.
        margin (`float`, *optional*, defaults to `0.1`):
            Margin per step in rank, m in the paper.
        reduction (`str`, *optional*, defaults to `"gap_mean"`):
            `"gap_mean"` averages the pairs of equal distance in rank and sums over distances, as the released code
            does; `"pair_sum"` sums a prompt's pairs and averages over prompts, as the paper writes it.
        length_penalty (`float`, *optional*, defaults to `1.0`):
            β: a response's score is its summed log-probability divided by its length to this power.
        mle_weight (`float`, *optional*, defaults to `1.0`):
            λ, the weight of the likelihood term.
        mle_on (`str`, *optional*, defaults to `"all"`):
            Which responses the likelihood term covers: `"all"`, the `"best"`, or the data set's `"reference"`.
    """

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `tuna_peft.load_base` when the model is given as a string."},
    )
    adapter_name: str = field(
        default="tuna",
        metadata={"help": "Name of the adapter made from `peft_config`; on a PeftModel, the next of the stack."},
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest prompt plus one response, in tokens. None for no limit."},
    )
    overflow: Overflow = field(
        default="error",
        metadata={"help": "What to do with a response that passes `max_length`: 'error', 'cut' or 'skip'."},
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Most tokens of one forward pass; the prompts of a batch are split to fit. None: no limit."},
    )
    # `str` for argument parsers, which take one type; a number is as welcome.
    activation_memory: str = field(
        default="auto",
        metadata={
            "help": "Layers keep their activations as far as they fit into so many GiB, or into what the device has "
            "left ('auto'); 'full' keeps all, 'none' recomputes every layer.",
        },
    )
    loss_type: Literal["hinge", "logistic", "list_mle"] = field(
        default="hinge",
        metadata={"help": "'hinge' (Tuna), 'logistic' (SimPO over all pairs of a list), 'list_mle' (Plackett-Luce)."},
    )
    beta: float = field(default=2.0, metadata={"help": "Inverse temperature of 'logistic' and 'list_mle'."})
    margin: float = field(default=0.1, metadata={"help": "Margin per step in rank (m in the paper)."})
    reduction: Literal["gap_mean", "pair_sum"] = field(
        default="gap_mean", metadata={"help": "'gap_mean' (released code) or 'pair_sum' (the paper's formula)."}
    )
    length_penalty: float = field(
        default=1.0,
        metadata={"help": "Scores are summed log-probabilities divided by length to this power (beta)."},
    )
    mle_weight: float = field(default=1.0, metadata={"help": "Weight of the likelihood term (lambda)."})
    mle_on: Literal["all", "best", "reference"] = field(
        default="all", metadata={"help": "Responses that the likelihood term covers: 'all', 'best' or 'reference'."}
    )

    # Defaults that differ from TrainingArguments.
    learning_rate: float = field(
        default=1e-4, metadata={"help": "Initial learning rate. LoRA takes about ten times that of full fine-tuning."}
    )
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every X update steps; below 1, a share of all steps."}
    )
    gradient_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Recompute activations where `activation_memory` does not hold them; False keeps all."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 autocast. By default on where the GPU has it (Ampere on), with fp16 on older ones."},
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        if getattr(self, "activation_checkpointing", True) is None:  # the name from transformers 5.18 on
            self.activation_checkpointing = self.gradient_checkpointing
        if self.bf16 is None:
            bf16, fp16 = mixed_precision(self.use_cpu)
            self.fp16: bool = self.fp16 or fp16
            self.bf16 = bf16 and not self.fp16
        super().__post_init__()
        for name in ("overflow", "loss_type", "reduction", "mle_on"):
            choices = get_args(get_type_hints(type(self))[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(choices)}")
        self.activation_memory = self._checked_activation_memory()  # type: ignore[assignment]
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for, and PyTorch warns
        use_one_gpu(self)

    def _checked_activation_memory(self) -> str | float:
        value: Any = self.activation_memory
        if isinstance(value, str) and value not in ("auto", "full", "none"):
            try:
                value = float(value)
            except ValueError:
                value = -1.0
        if not isinstance(value, str) and not value >= 0:
            raise ValueError(f"activation_memory={self.activation_memory!r}: use GiB, or one of auto, full, none")
        if not self.gradient_checkpointing:
            if value not in ("auto", "full"):
                raise ValueError(
                    f"activation_memory={self.activation_memory!r} needs gradient_checkpointing, which is off"
                )
            return "full"
        return value


def use_one_gpu(args: TrainingArguments) -> None:
    """On a machine with several: `Trainer` would take nn.DataParallel, which cannot split packed rows and which TRL
    refuses. Several GPUs run under `accelerate launch`."""
    if args.n_gpu > 1:
        args._n_gpu = 1


def mixed_precision(use_cpu: bool = False) -> tuple[bool, bool]:
    """`(bf16, fp16)` right for this machine: bf16 from Ampere on, fp16 on a T4, neither on CPU."""
    if use_cpu or not torch.cuda.is_available():
        return False, False
    has_bf16 = is_ampere_or_later(torch.cuda.get_device_capability())
    return has_bf16, not has_bf16
