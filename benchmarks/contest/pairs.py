"""TRL's own losses on the pairs of a list: `DPOTrainer`, and of its experimental part `CPOTrainer` and `ORPOTrainer`.

As in `benchmarks.trl_pairs`, their `compute_loss` runs and the trainers are not constructed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from trl.experimental.orpo import ORPOTrainer

from benchmarks.trl_pairs import _Accelerator, cpo_batch, cpo_trainer, dpo_batch, dpo_trainer

Row = dict[str, Any]
Objective = Callable[[Any], Callable[[list[Row]], torch.Tensor]]


def all_pairs(row: Row) -> list[Row]:
    """Every pair of responses that are not tied."""
    texts, ranks = row["completions_ids"], row["ranks"]
    order = range(len(ranks))
    return [_pair(row, texts[i], texts[j]) for i in order for j in order if ranks[i] < ranks[j]]


def best_and_worst(row: Row) -> list[Row]:
    """One pair: what is left of a list when it is made a preference data set the usual way."""
    by_rank = sorted(range(len(row["ranks"])), key=row["ranks"].__getitem__)
    return [_pair(row, row["completions_ids"][by_rank[0]], row["completions_ids"][by_rank[-1]])]


def _pair(row: Row, chosen: list[int], rejected: list[int]) -> Row:
    return {"prompt_ids": row["prompt_ids"], "completions_ids": [chosen, rejected]}


def dpo(pairs: Callable[[Row], list[Row]] = all_pairs) -> Objective:
    """DPO with TRL's defaults; the reference is the model without the adapter."""
    return _objective(lambda model: dpo_trainer(model, "cpu"), dpo_batch, pairs)


def cpo(pairs: Callable[[Row], list[Row]] = all_pairs) -> Objective:
    """CPO with TRL's defaults: a logistic loss on summed log-probabilities, and likelihood of the chosen."""
    return _objective(lambda model: cpo_trainer(model, "cpu"), cpo_batch, pairs)


def simpo(pairs: Callable[[Row], list[Row]] = all_pairs, beta: float = 2.0, gamma: float = 1.0) -> Objective:
    """SimPO as its paper sets it: beta 2, gamma / beta 0.5, no likelihood term."""

    def trainer_of(model):
        trainer = cpo_trainer(model, "cpu")
        trainer.loss_type, trainer.cpo_alpha, trainer.beta, trainer.simpo_gamma = "simpo", 0.0, beta, gamma
        return trainer

    return _objective(trainer_of, cpo_batch, pairs)


def orpo(pairs: Callable[[Row], list[Row]] = all_pairs) -> Objective:
    """ORPO with TRL's defaults."""

    def trainer_of(model):
        trainer: Any = ORPOTrainer.__new__(ORPOTrainer)
        trainer.is_encoder_decoder = trainer.aux_loss_enabled = trainer._peft_has_been_casted_to_bf16 = False
        trainer.beta, trainer.padding_value = 0.1, 0
        trainer.accelerator = _Accelerator("cpu")
        trainer.args = SimpleNamespace(device=torch.device("cpu"))
        trainer._stored_metrics = defaultdict(lambda: defaultdict(list))
        return trainer

    return _objective(trainer_of, cpo_batch, pairs)


def _objective(trainer_of: Callable[[Any], Any], collate: Any, pairs: Callable[[Row], list[Row]]) -> Objective:
    def on(model):
        trainer = trainer_of(model)
        return lambda rows: trainer.compute_loss(model, collate([pair for row in rows for pair in pairs(row)]))

    return on
