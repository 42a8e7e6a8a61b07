"""`TunaConfig`: the arguments of `TunaTrainer`.

`tuna_peft.recipe.train_fields` derives the `train:` keys of a ranking stage from it, and the recipe reference prints
its help texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

import torch
from transformers import SchedulerType, TrainingArguments

from tuna_peft.data.config import Overflow
from tuna_peft.limits import is_ampere_or_later
from tuna_peft.training.combinations import conflict
from tuna_peft.training.loss import LossType, MarginBy, PairWeight, Reduction
from tuna_peft.training.options import refuse_options
from tuna_peft.training.ranges import out_of_range


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
            Name of the adapter that is created from `peft_config`.

        > Parameters that control the data preprocessing

        max_length (`int` or `None`, *optional*, defaults to `1024`):
            Maximum tokens of a prompt plus one response; `None` for no limit.
        overflow (`str`, *optional*, defaults to `"error"`):
            What to do with a response longer than `max_length`: `"error"`, `"cut"` (truncate it), or `"skip"` it (and
            the row when fewer than two ranks are left).

        > Parameters that control memory

        max_tokens_per_batch (`int` or `str`, *optional*):
            Maximum tokens of one forward pass; a batch is split to fit, prompts of similar length together. The loss
            does not change: it is averaged over all prompts of the optimizer step. `"auto"` follows the device's
            memory in a recipe's run; elsewhere it is 4,096, or the longest row if that is longer.
        activation_memory (`str` or `float`, *optional*, defaults to `"auto"`):
            How many layers keep their activations, while the others use gradient checkpointing: as many as fit into
            this many GiB, or into the free memory of the device (`"auto"`); all (`"full"`, the same as
            `gradient_checkpointing=False`); or none (`"none"`). It changes memory and time, not results.

        > Parameters that control the loss

        loss_type (`str`, *optional*, defaults to `"hinge"`):
            Over pairs: `"hinge"` is Tuna's loss; `"logistic"` is SimPO's (https://huggingface.co/papers/2405.14734).
            Over the whole list: `"list_mle"` is the negative log-likelihood of the order under the Plackett-Luce model
            (ListMLE, Xia et al. 2008); `"mpo"` is the better half against the worse half
            (https://huggingface.co/papers/2412.04628); `"info_nca"` and `"nca"` take the scores as soft labels
            (https://huggingface.co/papers/2402.05369); `"qrpo"` fits the quantile of each response
            (https://huggingface.co/papers/2507.08068).
            See `tuna_peft.training.loss.RankingLoss`.
        reference (`str`, *optional*, defaults to `"none"`):
            `"below"` takes log-ratios to the frozen stack below the adapter that trains, instead of log-probabilities:
            DPO (https://huggingface.co/papers/2305.18290) over all pairs is `loss_type="logistic"` with
            `length_penalty=0`, `margin=0`, `beta=0.1`; DPO under Plackett-Luce the same with `"list_mle"`.
        beta (`float`, *optional*, defaults to `2.0`):
            Inverse temperature of all losses but `"hinge"`.
        margin (`float` or `"auto"`, *optional*, defaults to `0.1`):
            Margin per step in rank, m in the paper. `"auto"` is the median difference of two responses before
            training, per step.
        margin_by (`str`, *optional*, defaults to `"rank"`):
            `"score"` makes `margin` the margin per unit of score, instead of per step in rank.
        pair_weight (`str`, *optional*, defaults to `"equal"`):
            `"lambda"` weights pairs as LambdaLoss does, by scores and places (LiPO,
            https://huggingface.co/papers/2402.01878).
        score_scale (`float`, *optional*, defaults to `1.0`):
            Scores are divided by this before a loss uses them: α in InfoNCA and NCA, the unit of `margin_by="score"`.
        reduction (`str`, *optional*, defaults to `"gap_mean"`):
            `"gap_mean"` averages the pairs of equal distance in rank and sums over distances, as the released code
            does; `"pair_sum"` sums a prompt's pairs and averages over prompts, as the paper writes it.
        length_penalty (`float`, *optional*, defaults to `1.0`):
            β: a response's score is its summed log-probability divided by its length to this power.
        mle_weight (`float`, *optional*, defaults to `1.0`):
            λ, the weight of the SFT loss (NLL) term.
        mle_on (`str`, *optional*, defaults to `"all"`):
            Which responses the SFT loss term covers: `"all"`, the `"best"`, or the data set's `"reference"`.
    """

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `tuna_peft.load_base` when the model is given as a string."},
    )
    adapter_name: str = field(
        default="tuna",
        metadata={"help": "Name of the adapter that is created from `peft_config`."},
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Maximum tokens of a prompt plus one response. None for no limit."},
    )
    overflow: Overflow = field(
        default="error",
        metadata={"help": "What to do with a response longer than `max_length`: 'error', 'cut' (truncate) or 'skip'."},
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Maximum tokens of one forward pass; larger batches are split. 'auto', in a recipe, follows the "
            "device's memory; None for no limit."
        },
    )
    # Declared as `str` because argument parsers support one type only; numbers are accepted too.
    activation_memory: str = field(
        default="auto",
        metadata={
            "help": "GiB for activations that are kept instead of recomputed; 'auto' uses the free memory of the "
            "device, 'full' keeps all, 'none' recomputes every layer.",
        },
    )
    # Declared as `str` because argument parsers support one type only; booleans are accepted too.
    compile: str = field(
        default="auto",
        metadata={
            "help": "Compile each decoder layer with torch.compile, for any number of tokens. 'auto' compiles none, "
            "because the gain has not been measured on a GPU yet.",
        },
    )
    loss_type: LossType = field(
        default="hinge",
        metadata={
            "help": "Over pairs: 'hinge' (Tuna), 'logistic' (SimPO, DPO). Over the list: 'list_mle' (Plackett-Luce), "
            "'mpo' (better half against worse half), 'info_nca', 'nca' (scores as soft labels), 'qrpo' (quantiles)."
        },
    )
    reference: Literal["none", "below"] = field(
        default="none",
        metadata={
            "help": "'below': log-ratios to the frozen stack below the adapter that trains, instead of "
            "log-probabilities. DPO over all pairs: loss_type logistic, length_penalty 0, margin 0, beta 0.1."
        },
    )
    beta: float = field(default=2.0, metadata={"help": "Inverse temperature of all losses but 'hinge'."})
    # Declared as `float` because argument parsers support one type only; "auto" is accepted too.
    margin: float = field(
        default=0.1,
        metadata={
            "help": "Margin per step in rank (m in the paper); 'auto' is the median difference before training."
        },
    )
    margin_by: MarginBy = field(
        default="rank", metadata={"help": "'score': `margin` is per unit of score, not per step in rank."}
    )
    pair_weight: PairWeight = field(
        default="equal", metadata={"help": "'lambda' weights pairs by scores and places, as LambdaLoss does (LiPO)."}
    )
    score_scale: float = field(
        default=1.0, metadata={"help": "Scores are divided by this before a loss uses them (alpha in InfoNCA, NCA)."}
    )
    reduction: Reduction = field(
        default="gap_mean", metadata={"help": "'gap_mean' (released code) or 'pair_sum' (the paper's formula)."}
    )
    length_penalty: float = field(
        default=1.0,
        metadata={"help": "Scores are summed log-probabilities divided by length to this power (beta)."},
    )
    mle_weight: float = field(default=1.0, metadata={"help": "Weight of the SFT loss (NLL) term (lambda)."})
    mle_on: Literal["all", "best", "reference"] = field(
        default="all", metadata={"help": "Responses that the SFT loss term covers: 'all', 'best' or 'reference'."}
    )

    # Defaults that differ from TrainingArguments.
    learning_rate: float = field(
        default=1e-4,
        metadata={
            "help": "Initial learning rate. LoRA needs about ten times that of full fine-tuning. 'auto' chooses by "
            "the hidden size of the model."
        },
    )
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every X update steps; below 1, a fraction of all steps."}
    )
    gradient_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Recompute the activations that `activation_memory` does not keep; False keeps all."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 autocast. By default on for GPUs from Ampere on; older GPUs use fp16."},
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        refuse_options(self)
        # transformers 5.18 renamed the field; None means that only the old name was set.
        if getattr(self, "activation_checkpointing", True) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.bf16 is None:
            bf16, fp16 = mixed_precision(self.use_cpu)
            self.fp16: bool = self.fp16 or fp16
            self.bf16 = bf16 and not self.fp16
        for each in fields(self):
            if what := out_of_range(each.name, getattr(self, each.name)):
                raise ValueError(f"{each.name}: {what}")
        super().__post_init__()
        for name in ("overflow", "loss_type", "reference", "margin_by", "pair_weight", "reduction", "mle_on"):
            choices = get_args(get_type_hints(type(self))[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(choices)}")
        if self.learning_rate != "auto" and not isinstance(self.learning_rate, (int, float)):
            raise ValueError(f"learning_rate={self.learning_rate!r}: use a number or 'auto'")
        if self.margin != "auto" and not isinstance(self.margin, (int, float)):
            raise ValueError(f"margin={self.margin!r}: use a number or 'auto'")
        if isinstance(self.max_tokens_per_batch, str) and self.max_tokens_per_batch != "auto":
            raise ValueError(f"max_tokens_per_batch={self.max_tokens_per_batch!r}: use a number, or auto")
        if str(self.compile).lower() not in ("auto", "true", "false"):
            raise ValueError(f"compile={self.compile!r}: use true, false or auto")
        self.compile = str(self.compile).lower() == "true"  # type: ignore[assignment]
        if excluded := conflict(self):
            raise ValueError(excluded)
        self.activation_memory = self._checked_activation_memory()  # type: ignore[assignment]
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # useless without a GPU, and PyTorch warns
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
        if self.gradient_checkpointing:
            return value
        if value not in ("auto", "full"):
            raise ValueError(
                f"activation_memory={self.activation_memory!r} needs gradient_checkpointing, which is off"
            )
        return "full"


def use_one_gpu(args: TrainingArguments) -> None:
    """Uses one GPU of several, unless `accelerate launch` starts a process for each.

    `Trainer` would use `nn.DataParallel`, which cannot split packed sequences and which TRL rejects.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1


def mixed_precision(use_cpu: bool = False) -> tuple[bool, bool]:
    """`(bf16, fp16)` for this machine: bf16 on GPUs from Ampere on, fp16 on older ones (T4), neither on a CPU."""
    if use_cpu or not torch.cuda.is_available():
        return False, False
    has_bf16 = is_ampere_or_later(torch.cuda.get_device_capability())
    return has_bf16, not has_bf16
