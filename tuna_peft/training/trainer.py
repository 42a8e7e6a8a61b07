"""`TunaTrainer`: learns from ranked responses, with LoRA adapters stacked on a frozen, usually 4-bit, base."""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from tuna_peft.data.collate import RankedCollator
from tuna_peft.data.micro_batches import MicroBatchCollator, halves
from tuna_peft.data.tokenize import encode_dataset
from tuna_peft.errors import UserError
from tuna_peft.limits import LONG_ROW, context_length, within_context
from tuna_peft.models.base.dequantise import keep_quantised_layout, require_exact_dequantisation
from tuna_peft.models.base.load import load_base
from tuna_peft.models.base.shards import is_sharded
from tuna_peft.models.forward.logps import require_plain_head
from tuna_peft.models.forward.prefix import describe_attention
from tuna_peft.models.forward.scoring import response_logps, unwrap
from tuna_peft.models.forward.verify import verify_shared_rows
from tuna_peft.models.stack.adapters import push_adapter
from tuna_peft.training.activation_memory import ActivationMemory
from tuna_peft.training.checkpoint import StackCheckpoints, require_trainable
from tuna_peft.training.config import TunaConfig
from tuna_peft.training.loss import PairCounts, RankingLoss
from tuna_peft.training.metrics import RunningMeans, pair_statistics

logger = logging.getLogger("tuna_peft")


@dataclass
class StepCounts:
    """What one optimiser step's loss is averaged over, in all micro-batches and processes.

    Attributes:
        pairs: Pairs by distance in rank, 1 first.
        prompts: Prompts.
        mle_tokens: Response tokens of the likelihood term.
    """

    pairs: list[int]
    prompts: int
    mle_tokens: int


class TunaTrainer(StackCheckpoints, Trainer):
    """
    Trainer for Tuna's ranking loss (https://arxiv.org/abs/2310.13385).

    Example:

    ```python
    from datasets import Dataset
    from peft import LoraConfig
    from tuna_peft import TunaConfig, TunaTrainer

    data = Dataset.from_list(
        [{"prompt": "The sky is", "completions": [" blue.", " made of cheese."], "scores": [1.0, 0.0]}]
    )
    trainer = TunaTrainer("Qwen/Qwen3-0.6B", TunaConfig("out"), train_dataset=data, peft_config=LoraConfig())
    trainer.train()
    ```

    Args:
        model: Path, Hub id or `builtin:` name; or a loaded causal LM; or a `PeftModel`. With a `PeftModel` *and* a
            `peft_config`, the new adapter becomes the next of the stack, on top of frozen ones.
        args: See `TunaConfig`.
        train_dataset: Columns `prompt`, `completions` and `scores` (higher is better) or `ranks`; optionally
            `reference` and `id`. Prompts and completions are strings or lists of messages.
        eval_dataset: The same, or a dict of such data sets.
        processing_class: The tokenizer; loaded with the model by default.
        peft_config: The LoRA configuration of the adapter to train.
        quantization_config: For a model given as a string.
        data_collator: As for `transformers.Trainer`, like `callbacks` and `optimizers`.

    Raises:
        UserError: The data cannot be ranked, tokenised or fitted into `max_length`; the model cannot be trained.
    """

    _tag_names = ["tuna", "ranking", "peft"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TunaConfig | None = None,
        data_collator: Any | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: LoraConfig | None = None,
    ):
        args = args or TunaConfig("tuna-output")
        if train_dataset is None and eval_dataset is None:
            raise ValueError("`train_dataset` is required (or an `eval_dataset`, to evaluate only)")

        # Adapters start from random weights: the seed comes before them.
        set_seed(args.seed)
        if isinstance(model, str):
            if quantization_config is not None and peft_config is None:
                raise UserError("a quantised base cannot be trained itself", fix="Pass a peft_config.")
            model_options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
            base = load_base(model, quantization_config=quantization_config, **model_options)
            model, processing_class = base.model, processing_class or base.tokenizer
            model.requires_grad_(peft_config is None)
        elif quantization_config is not None or args.model_init_kwargs:
            raise ValueError("`quantization_config` and `model_init_kwargs` go with a model given as a string")
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token

        keep_quantised_layout(model)
        require_exact_dequantisation(model)
        if peft_config is not None:
            model = push_adapter(model, args.adapter_name, peft_config)
        if args.gradient_checkpointing and isinstance(model, PeftModel):
            model.enable_input_require_grads()
        if train_dataset is not None:
            require_trainable(model)
        require_plain_head(model)

        context = context_length(model.config)
        prepare = functools.partial(self._prepare_dataset, tokenizer=processing_class, args=args, context=context)
        if train_dataset is not None:
            train_dataset = prepare(train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(dataset) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset)

        collator = MicroBatchCollator(
            RankedCollator(processing_class.pad_token_id, mle_on=args.mle_on), args.max_tokens_per_batch
        )
        if train_dataset is not None:
            collator.require_fitting(train_dataset)
            if args.train_sampling_strategy == "group_by_length":  # Trainer would look for `input_ids`
                lengths = [len(row["prompt_ids"]) + sum(map(len, row["completions_ids"])) for row in train_dataset]
                train_dataset = train_dataset.add_column(args.length_column_name, lengths)
        self._verified = False
        self._activations = ActivationMemory(args.activation_memory, args.world_size)
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), self._activations],
            optimizers=optimizers,
        )
        # `compute_loss` divides by the counts of the whole optimiser step, so Trainer must not divide again.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # says the same to transformers < 5.19
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    @staticmethod
    def _prepare_dataset(
        dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: TunaConfig, context: int | None
    ) -> Dataset:
        if "prompt_ids" in dataset.column_names:
            return dataset
        encoded, _ = encode_dataset(
            dataset, tokenizer, max_length=within_context(args.max_length, context), overflow=args.overflow,
            needs_reference=args.mle_on == "reference",
        )  # fmt: skip
        return encoded

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: list[str] | None = [
                "prompt_ids", "completions_ids", "completion_skips", "ranks", "reference_ids", "reference_skip",
                self.args.length_column_name,
            ]  # fmt: skip

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Also counts what the loss of this optimiser step is averaged over, in all micro-batches and processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        micro_batches = [micro_batch for batch in batches for micro_batch in batch["micro_batches"]]
        self.state.num_input_tokens_seen += sum(len(batch["tokens"]) for batch in micro_batches)
        return batches, self._count(micro_batches)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward over the micro-batches of one batch; out of memory, over their halves."""
        if not self._verified:
            self._verify(model)
        micro_batches = inputs["micro_batches"]
        if self.accelerator.num_processes > 1:
            # One process cannot go back alone, and what is exchanged at the end are the gradients of all batches:
            # they must stay where they are.
            return self._accumulate(model, micro_batches, num_items_in_batch)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        earlier = [parameter.grad for parameter in parameters]
        metrics = self._means["train"].copy()
        while True:
            # Gradients of earlier batches are kept aside, so that a pass that failed half-way leaves no trace.
            for parameter in parameters:
                parameter.grad = None
            try:
                loss = self._accumulate(model, micro_batches, num_items_in_batch)
                break
            except torch.OutOfMemoryError:
                spared = self._activations.give_back()
                if not spared and all(len(batch["ranks"]) == 1 for batch in micro_batches):
                    raise
            self._means["train"] = metrics.copy()
            if spared:
                logger.warning("out of memory: every layer recomputes from here on; lower activation_memory")
            else:
                micro_batches = [part for batch in micro_batches for part in halves(batch)]
                logger.warning(
                    "out of memory: this step goes on in %d forward passes; lower max_tokens_per_batch to save time",
                    len(micro_batches),
                )
            torch.cuda.empty_cache()
        for parameter, gradient in zip(parameters, earlier, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss

    def _verify(self, model) -> None:
        """Once per run: rows that share a prompt against separate ones, on the shortest of the first rows and on the
        shortest of them that is long enough for attention by segment."""
        rows = self.train_dataset.select(range(min(32, len(self.train_dataset))))
        lengths = [len(row["prompt_ids"]) + sum(map(len, row["completions_ids"])) for row in rows]
        long = [length for length in lengths if length >= LONG_ROW]
        chosen = {lengths.index(min(lengths)), *([lengths.index(min(long))] if long else [])}
        with self.accelerator.autocast():  # as the model's forward pass has it
            difference = max(verify_shared_rows(model, rows[index], self.args.device) for index in chosen)
        logger.info("shared rows agree with separate rows to %.1e nats a token", difference)
        logger.info(describe_attention(unwrap(model), self.args.device))
        self._verified = True

    def _accumulate(self, model, micro_batches: list[dict[str, torch.Tensor]], counts: StepCounts) -> torch.Tensor:
        if self.exchanges_in_each_pass or is_sharded(model):
            self._keep_pace(model, micro_batches)
        losses = []
        for index, micro_batch in enumerate(micro_batches):
            # Processes exchange gradients once, after the last backward pass.
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.before_the_last_pass(model):
                losses.append(super().training_step(model, micro_batch, counts))
        return torch.stack(losses).sum()

    def _keep_pace(self, model, micro_batches: list[dict[str, torch.Tensor]]) -> None:
        """Forward and backward passes that count for nothing, up to the number of the process with the most: each
        pass gathers shards from all processes, or gives gradients to them."""
        most = max(gather_object([len(micro_batches)]))
        smallest = self._prepare_inputs(micro_batches[-1])
        for _ in range(most - len(micro_batches)):
            with self.before_the_last_pass(model):
                with self.compute_loss_context_manager():
                    nothing = response_logps(model, smallest).sums_BN.sum() * 0
                self.accelerator.backward(nothing)

    def _count(self, batches: list[dict[str, torch.Tensor]]) -> StepCounts:
        own = [_micro_batch_counts(batch) for batch in batches]
        everywhere = gather_object(own) if self.accelerator.num_processes > 1 else own
        return StepCounts(
            pairs=[sum(pairs) for pairs in zip_longest(*(pairs for pairs, _, _ in everywhere), fillvalue=0)],
            prompts=sum(prompts for _, prompts, _ in everywhere),
            mle_tokens=sum(tokens for _, _, tokens in everywhere),
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: StepCounts | None = None):
        """Rank loss plus `mle_weight` times the token mean of the likelihood term."""
        training = model.training
        counts = num_items_in_batch or self._count([inputs])
        args, ranks_BN = self.args, inputs["ranks"]
        logps = response_logps(model, inputs)
        scores_BN = logps.normalised(args.length_penalty)

        step = PairCounts(
            torch.tensor(counts.pairs, device=scores_BN.device), torch.tensor(counts.prompts, device=scores_BN.device)
        )
        rank_loss = RankingLoss(args.loss_type, args.margin, args.reduction, args.beta)(scores_BN, ranks_BN, step)
        mle_loss = -torch.where(inputs["mle"], logps.sums_BN, 0.0).sum() / max(counts.mle_tokens, 1)
        loss = rank_loss + args.mle_weight * mle_loss

        self._record(training, scores_BN.detach(), inputs, rank_loss, mle_loss, counts.prompts)
        # Gradients and logs are averaged over processes, while the counts are those of all of them.
        loss = loss * self.accelerator.num_processes
        return (loss, {"scores": scores_BN}) if return_outputs else loss

    def _record(self, training, scores_BN, inputs, rank_loss, mle_loss, prompts) -> None:
        means, ranks_BN = self._means["train" if training else "eval"], inputs["ranks"]
        right, satisfied, pairs = pair_statistics(scores_BN, ranks_BN, self.args.margin)
        means.add("ranking_accuracy", right, pairs)
        means.add("margin_satisfaction", satisfied, pairs)
        for rank in range(ranks_BN.shape[1]):
            here_BN = ranks_BN == rank
            means.add(f"scores/rank_{rank}", torch.where(here_BN, scores_BN, 0.0).sum(), here_BN.sum())
        share = len(ranks_BN) / prompts  # of the step: the shares of all micro-batches and processes add up to one
        means.add("rank_loss", rank_loss, share)
        means.add("mle_loss", mle_loss, share)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone: metrics are recorded on the way."""
        micro_batches = self._prepare_inputs(inputs)["micro_batches"]
        counts = self._count(micro_batches)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [self.compute_loss(model, batch, num_items_in_batch=counts) for batch in micro_batches]
        return torch.stack(losses).sum(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the ranking metrics to what `Trainer` logs."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        for name, (total, count) in self._gathered(self._means[mode].pop()).items():
            if count:
                logs[prefix + name] = total / count
        if mode == "train" and "loss" in logs:
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def _gathered(self, sums: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        if self.accelerator.num_processes == 1:
            return sums
        gathered: dict[str, tuple[float, float]] = {}
        for process in gather_object([sums]):
            for name, (total, count) in process.items():
                before = gathered.get(name, (0.0, 0.0))
                gathered[name] = (before[0] + total, before[1] + count)
        return gathered


def _micro_batch_counts(batch: dict[str, torch.Tensor]) -> tuple[list[int], int, int]:
    """Pairs by distance, prompts, and tokens of the likelihood term."""
    counts = PairCounts.of(batch["ranks"])
    mle_tokens = batch["mle"].flatten()[batch["candidates"]].sum()
    return counts.pairs_G.tolist(), int(counts.prompts), int(mle_tokens)
