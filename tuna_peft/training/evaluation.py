"""Evaluation of `TunaTrainer`: the metrics of each call belong to that call, whatever its data set and prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import pad
from transformers import Trainer

from tuna_peft.data.batch import PackedBatch
from tuna_peft.training.loss import RankingLoss
from tuna_peft.training.metrics import RunningMeans, add_ranking_metrics
from tuna_peft.training.step_counts import StepCounts


class RankedEvaluation(Trainer):
    """Mixin for `TunaTrainer`; put it before `Trainer`."""

    args: Any
    _encode: Callable[[Any], Dataset]
    _ranking_loss: RankingLoss
    _count: Callable[[list[PackedBatch]], StepCounts]

    def get_eval_dataloader(self, eval_dataset=None):
        """Also takes a data set that is not tokenized yet, like `get_test_dataloader`."""
        given = eval_dataset is not None and not isinstance(eval_dataset, str)
        return super().get_eval_dataloader(self._encode(eval_dataset) if given else eval_dataset)

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(self._encode(test_dataset))

    def _record_evaluation(
        self,
        scores_BN: torch.Tensor,
        ranks_BN: torch.Tensor,
        sums_G: torch.Tensor,
        nll: torch.Tensor,
        counts: StepCounts,
    ) -> None:
        """Adds one micro-batch, with its own counts, to the metrics of the evaluation that runs."""
        add_ranking_metrics(self._evaluated, scores_BN, ranks_BN, self.args.margin)
        denominators_G = self._ranking_loss.denominators(counts.pair_counts(scores_BN.device))[: len(sums_G)]
        for gap, (total, count) in enumerate(zip(sums_G, denominators_G, strict=True)):
            self._evaluated.add(f"rank_loss/{gap}", total, count)
        self._evaluated.add("mle_loss", nll, counts.mle_tokens)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Evaluates one data set. Its metrics get `metric_key_prefix`, and so does its loss, which is averaged as in
        one training step over the whole data set: it does not depend on the batch size."""
        self._evaluated = RunningMeans()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._evaluated.pop(several_processes=self.accelerator.num_processes > 1)
        by_gap = [means.pop(name) for name in list(means) if name.startswith("rank_loss/")]
        means["rank_loss"] = sum(by_gap)
        means["loss"] = means["rank_loss"] + self.args.mle_weight * means.get("mle_loss", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss; and scores and ranks `(prompts, n)`, -100 where a response is missing. `compute_loss` records the
        metrics."""
        micro_batches = inputs["micro_batches"]
        counts = self._count(micro_batches)
        results = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in map(self._prepare_inputs, micro_batches):
                loss, outputs = self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=counts)
                results.append((loss, outputs["scores"], batch.ranks_BN))
        loss = torch.stack([loss for loss, _, _ in results]).sum()
        if prediction_loss_only:
            return loss, None, None
        # Micro-batches hold the prompts by length: back into the order of the rows.
        rows = torch.tensor(inputs.get("order") or range(counts.prompts), device=loss.device).argsort()
        n = max(ranks_BN.shape[1] for _, _, ranks_BN in results)
        scores, ranks = (
            torch.cat([pad(values[of], (0, n - values[of].shape[1]), value=-1) for values in results])[rows]
            for of in (1, 2)
        )
        return loss, scores.masked_fill(ranks < 0, -100), ranks.masked_fill(ranks < 0, -100)
