"""`TunaTrainer`: trains on ranked responses, with LoRA adapters stacked on a frozen, usually 4-bit, base.

`tuna_peft.run.train_stage` uses it for the ranking stages of a recipe; it also works alone, like TRL's trainers. From
`train()` to the loss: `Trainer` takes the batches of one optimizer step (`get_batch_samples`, which also counts what
the loss is averaged over) and calls `training_step` for each; that calls `compute_loss` for each micro-batch.

Shape suffixes: B prompts, N responses.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import LoraConfig, PeftModel
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from tuna_peft.data.batch import PackedBatch
from tuna_peft.data.collate import MicroBatchCollator, RankedCollator, total_length
from tuna_peft.files import write_text
from tuna_peft.limits import LONG_ROW, UNPLANNED_TOKENS, context_length
from tuna_peft.models.base.dequantise import keep_quantised_layout, require_exact_dequantisation
from tuna_peft.models.base.load import model_id, require_unquantized
from tuna_peft.models.base.shards import is_sharded
from tuna_peft.models.forward.logps import output_head
from tuna_peft.models.forward.prefix import describe_attention
from tuna_peft.models.forward.scoring import response_logps, unwrap
from tuna_peft.models.forward.segments import layer_windows
from tuna_peft.models.forward.verify import verify_packing
from tuna_peft.models.stack.adapters import push_adapter
from tuna_peft.training.activation_memory import ActivationMemory
from tuna_peft.training.auto_margin import initial_margin
from tuna_peft.training.card import trainer_card
from tuna_peft.training.checkpoint import StackCheckpoints, require_trainable
from tuna_peft.training.compiled_layers import CompiledLayers
from tuna_peft.training.config import TunaConfig
from tuna_peft.training.evaluation import RankedEvaluation
from tuna_peft.training.finite import SkippedSteps, require_finite_loss
from tuna_peft.training.inputs import encoded_rows, load_model
from tuna_peft.training.learning_rate import auto_learning_rate
from tuna_peft.training.loss import RankingLoss
from tuna_peft.training.metrics import RunningMeans, add_ranking_metrics
from tuna_peft.training.reference import ReferenceLogps, require_stack_below
from tuna_peft.training.stage_options import require_possible
from tuna_peft.training.step_counts import StepCounts

logger = logging.getLogger("tuna_peft")


class TunaTrainer(RankedEvaluation, StackCheckpoints, Trainer):
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
            `reference` and `id`. Prompts and completions are strings or lists of messages. A `datasets.Dataset`, a
            list of dicts, or a PyTorch data set with a length.
        eval_dataset: The same, or a dict of such data sets; `evaluate` and `predict` take the same.
        processing_class: The tokenizer; loaded with the model by default.
        peft_config: The LoRA configuration of the adapter to train.
        quantization_config: For a model given as a string.
        data_collator: Takes a list of tokenized rows (`tuna_peft.data.tokenize.encode_ranked`) and returns
            `{"micro_batches": [PackedBatch, ...]}`, as the default, `MicroBatchCollator`, does. Each row has to be in
            exactly one of the batches; the loss is averaged over all of them.
        callbacks: As for `transformers.Trainer`, like `optimizers`.
        compute_metrics: Called after an evaluation with an `EvalPrediction`: `predictions` are the scores
            `(prompts, n)`, `label_ids` the ranks (0 is best); both are -100 where a response is missing.

    Raises:
        UserError: An option cannot work; the data cannot be ranked, tokenized or fitted into `max_length`; the model
            cannot be trained.
    """

    _tag_names = ["tuna", "ranking", "peft"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TunaConfig | None = None,
        data_collator: Any | None = None,
        train_dataset: Any | None = None,
        eval_dataset: Any | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: LoraConfig | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
    ):
        args = args or TunaConfig("tuna-output")
        if train_dataset is None and eval_dataset is None:
            raise ValueError("`train_dataset` is required (or an `eval_dataset`, to evaluate only)")

        require_possible(args, where="args")

        # Seed: before the model, because adapters start from random weights.
        set_seed(args.seed)

        # Model and tokenizer
        if isinstance(model, str):
            model, processing_class = load_model(model, args, processing_class, quantization_config, peft_config)
        elif quantization_config is not None or args.model_init_kwargs:
            raise ValueError("`quantization_config` and `model_init_kwargs` go with a model given as a string")
        else:
            require_unquantized(model.config, model_id(model), merging=False)
        layer_windows(model.config.get_text_config())
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token  # safe: padding is known by segment, not by id

        # Adapter
        # bitsandbytes 0.50 on CPUs: with AVX512_BF16 it repacks 4-bit weights in the first forward pass without
        # gradients, and reading them later gives wrong values; some input sizes are dequantized wrongly.
        keep_quantised_layout(model)
        require_exact_dequantisation(model)
        if peft_config is not None:
            model = push_adapter(model, args.adapter_name, peft_config)
        if args.gradient_checkpointing and isinstance(model, PeftModel):
            # The embeddings are frozen, so the input of the first layer would need no gradient, and reentrant
            # checkpointing computes no gradients for a layer whose inputs need none.
            model.enable_input_require_grads()
        if train_dataset is not None:
            require_trainable(model)
        output_head(model)
        if args.reference == "below":
            require_stack_below(model)
        if args.learning_rate == "auto":
            args.learning_rate = auto_learning_rate(
                model.config.get_text_config().hidden_size, ranking=True, log_ratios=args.reference == "below"
            )
            logger.info("learning_rate auto: %.2g", args.learning_rate)

        # Data
        self._encode = partial(
            encoded_rows, tokenizer=processing_class, args=args, context=context_length(model.config),
            vocabulary=getattr(model.config.get_text_config(), "vocab_size", None),
        )  # fmt: skip
        if train_dataset is not None:
            train_dataset = self._encode(train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._encode(dataset) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._encode(eval_dataset)

        # Collator
        ranked_collator = RankedCollator(processing_class.pad_token_id, mle_on=args.mle_on)
        eager = model.config.get_text_config()._attn_implementation == "eager"
        budget: Any = args.max_tokens_per_batch
        if budget == "auto":  # no plan has replaced it
            budget = max([UNPLANNED_TOKENS, *map(total_length, train_dataset or ())])
        collator = MicroBatchCollator(ranked_collator, budget, by_segment=not eager)
        if train_dataset is not None:
            collator.require_fitting(train_dataset)

        # State of this class, which `Trainer.__init__` and the callbacks may use already
        self._verified = False
        self._activations = ActivationMemory(args.activation_memory, args.world_size, sharded=is_sharded(model))
        self._means, self._evaluated = RunningMeans(), RunningMeans()
        self._reference = ReferenceLogps() if args.reference == "below" else None
        self._ranking_loss = RankingLoss(
            args.loss_type, args.margin, args.reduction, args.beta, args.margin_by, args.pair_weight, args.score_scale
        )

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[*(callbacks or []), self._activations, SkippedSteps(), CompiledLayers()],
            optimizers=optimizers,
        )

        # Loss scaling: `compute_loss` divides by the counts of the whole optimizer step, so `Trainer` must not divide
        # by the number of accumulated batches as well. transformers < 5.19 reads the second name only.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

        # Margin: here the adapter is as it starts, also where training is resumed later.
        if args.margin == "auto":
            if train_dataset is None:
                raise ValueError("margin='auto' is measured on the `train_dataset`, and there is none: use a number")
            args.margin = initial_margin(
                self.model, self.train_dataset, ranked_collator, self._ranking_loss, args.length_penalty
            )
            self._ranking_loss = replace(self._ranking_loss, margin=args.margin)
            logger.info("margin auto: %.2g", args.margin)

        # Tags for the Hub
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    def _set_signature_columns_if_needed(self) -> None:
        """`Trainer` removes other columns of the data; by default it keeps the arguments of the model's `forward`."""
        if self._signature_columns is None:
            self._signature_columns: list[str] | None = [
                "prompt_ids", "completions_ids", "completion_skips", "completion_gaps", "ranks", "scores",
                "reference_ids", "reference_skip", "reference_gaps", self.args.length_column_name,
            ]  # fmt: skip

    def _prepare_inputs(self, inputs):
        """Also moves a `PackedBatch` to the device: `Trainer` knows tensors, lists and mappings only."""
        return inputs.to(self.args.device) if isinstance(inputs, PackedBatch) else super()._prepare_inputs(inputs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimizer step, and the `StepCounts` that their loss is averaged over."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        micro_batches = [micro_batch for batch in batches for micro_batch in batch["micro_batches"]]
        counts = self._count(micro_batches)
        # `Trainer` would count only a tensor at the top level of a batch, padding included.
        self.state.num_input_tokens_seen += counts.tokens
        return batches, counts

    def metric_sums(self):
        return self._means.sums()

    def restore_metric_sums(self, sums):
        self._means.restore(sums)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward passes over the micro-batches of one batch.

        When memory runs out, a single process repeats the batch: first with fewer kept activations, at last with none,
        then with every micro-batch split in half. The loss and the gradients stay the same, up to rounding.
        """
        if not self._verified:
            self._verify(model)
        micro_batches: list[PackedBatch] = inputs["micro_batches"]
        # One process of several cannot repeat a pass that all of them take part in, and gradients must stay in place,
        # because DDP and DeepSpeed exchange the accumulated ones after the last pass.
        can_repeat = self.accelerator.num_processes == 1
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad] if can_repeat else []
        earlier = [parameter.grad for parameter in parameters]
        metrics = self._means.copy()
        if self.exchanges_in_each_pass or is_sharded(model):
            self._equalize_passes(model, micro_batches)
        while True:
            # Gradients of earlier batches are set aside: a pass that fails half-way must not leave a part of its own.
            for parameter in parameters:
                parameter.grad = None
            losses = []
            try:
                for index, micro_batch in enumerate(micro_batches):
                    last = index == len(micro_batches) - 1
                    with contextlib.nullcontext() if last else self.accumulate_gradients(model):
                        losses.append(super().training_step(model, micro_batch, num_items_in_batch))
                break
            except torch.OutOfMemoryError:
                smaller = self._with_less_memory(micro_batches) if can_repeat else None
                if smaller is None:
                    raise
                micro_batches = smaller
            self._means = metrics.copy()
            torch.cuda.empty_cache()
        for parameter, gradient in zip(parameters, earlier, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        loss = torch.stack(losses).sum()
        require_finite_loss(self, loss)
        return loss

    def _with_less_memory(self, micro_batches: list[PackedBatch]) -> list[PackedBatch] | None:
        """The micro-batches to try next after running out of memory, or None when nothing is left to try."""
        if self._activations.release():
            logger.warning(
                "out of memory: from now on half as many layers keep their activations; lower activation_memory"
            )
            return micro_batches
        if all(len(batch.ranks_BN) == 1 for batch in micro_batches):
            return None
        halves = [half for batch in micro_batches for half in batch.halves()]
        logger.warning(
            "out of memory: repeating this step in %d forward passes; lower max_tokens_per_batch to save time",
            len(halves),
        )
        return halves

    def _verify(self, model) -> None:
        """Once per run: compares packed with separate sequences, on the shortest of the first rows and on the shortest
        of those that are long enough for attention by segment."""
        rows = self.train_dataset.select(range(min(32, len(self.train_dataset))))
        lengths = [total_length(row) for row in rows]
        long = [length for length in lengths if length >= LONG_ROW]
        chosen = {lengths.index(min(lengths)), *([lengths.index(min(long))] if long else [])}
        with self.accelerator.autocast():  # as the training passes run
            difference = max(verify_packing(model, rows[index], self.args.device) for index in chosen)
        logger.debug("packed sequences match separate ones to %.1e nats per token", difference)
        logger.debug(describe_attention(unwrap(model), self.args.device))
        self._verified = True

    def _equalize_passes(self, model, micro_batches: list[PackedBatch]) -> None:
        """Runs dummy passes until this process has as many as the one with the most micro-batches.

        With a sharded base every pass gathers weights from all processes, and with ZeRO-2 it sends gradients to them:
        a process with fewer passes would leave the others waiting.
        """
        most = max(gather_object([len(micro_batches)]))
        smallest = self._prepare_inputs(micro_batches[-1])
        for _ in range(most - len(micro_batches)):
            with self.accumulate_gradients(model):
                with self.compute_loss_context_manager():
                    zero = response_logps(model, smallest).sums_BN.sum() * 0
                self.accelerator.backward(zero)

    def _count(self, batches: list[PackedBatch]) -> StepCounts:
        return StepCounts.of(batches, several_processes=self.accelerator.num_processes > 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: StepCounts | None = None):
        """The ranking loss plus `mle_weight` times the token mean of the SFT loss (NLL) term, for one `PackedBatch`.

        Args:
            num_items_in_batch: What both are averaged over; by default this batch alone. The losses of all
                micro-batches of an optimizer step, each with the counts of the step, add up to the loss of the step.
        """
        counts = num_items_in_batch or self._count([inputs])
        args, ranks_BN = self.args, inputs.ranks_BN
        # Before the pass with gradients, whose activations take memory.
        reference_BN = self._reference(model, inputs) if self._reference else 0.0
        logps = response_logps(model, inputs)
        scores_BN = logps.normalised(args.length_penalty)  # the metrics are about these, with a reference too
        v_BN = replace(logps, sums_BN=logps.sums_BN - reference_BN).normalised(args.length_penalty)

        rank_loss = self._ranking_loss(v_BN, ranks_BN, counts.pair_counts(v_BN.device), inputs.grades_BN)
        nll = -torch.where(inputs.mle_BN, logps.sums_BN, 0.0).sum()
        mle_loss = nll / max(counts.mle_tokens, 1)
        loss = rank_loss + args.mle_weight * mle_loss

        if model.training:
            share = len(ranks_BN) / counts.prompts  # the shares of all micro-batches of a step add up to 1
            add_ranking_metrics(self._means, scores_BN.detach(), ranks_BN, args.margin)
            self._means.add("rank_loss", rank_loss, share)
            self._means.add("mle_loss", mle_loss, share)
        else:
            sums_G = self._ranking_loss.sums(v_BN, ranks_BN, inputs.grades_BN)
            self._record_evaluation(scores_BN, ranks_BN, sums_G, nll, StepCounts.of([inputs]))
        # The counts are those of all processes, but gradients and logs are averaged over processes afterwards.
        loss = loss * self.accelerator.num_processes
        return (loss, {"scores": scores_BN}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the ranking metrics of training to the values that `Trainer` logs of it."""
        if "loss" in logs or "total_flos" in logs:  # of some steps, or of the whole training
            logs.update(self._means.pop(several_processes=self.accelerator.num_processes > 1))
        if "loss" in logs:
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes `README.md` to the output folder, as `push_to_hub` does with the same keyword arguments.

        Args:
            model_name: By default the name of the output folder.
            dataset_name: Hub id of the data set.
            tags: More tags for the Hub.
        """
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            more = [tags] if isinstance(tags, str) else tags or []
            card = trainer_card(self, model_name or folder.resolve().name, dataset_name, [*self._tag_names, *more])
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "README.md", card)
