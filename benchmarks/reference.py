"""The ranking step as in the released code of Tuna, where responses share no computation: the reference.

Every response is a separate sequence with its prompt, padded to the longest of the micro-batch. One forward pass
computes the logits of all positions; transformers' own loss is the SFT loss, and a log-softmax over all logits,
gathered at the labels, gives the scores. The released code (Li et al. 2023, microsoft/LMOps) uses full fine-tuning,
this one LoRA on a 4-bit base.

Shape suffixes: B prompts, N responses, T tokens of a sequence.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.workloads import Group
from tuna_peft.training.loss import tuna_loss

IGNORED = -100


def batch_of(groups: list[Group]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `labels` `(B * N, T)`, right-padded."""
    rows = [(group["prompt_ids"], response) for group in groups for response in group["completions_ids"]]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(response)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of(model: Any, batch: dict[str, torch.Tensor], responses: int) -> torch.Tensor:
    """Ranking loss plus SFT loss."""
    output = model(**batch)
    logps = torch.nn.functional.log_softmax(output.logits[:, :-1].float(), dim=-1)
    labels = batch["labels"][:, 1:]
    there = labels != IGNORED
    token_logps = logps.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1) * there
    scores_BN = (token_logps.sum(-1) / there.sum(-1)).view(-1, responses)
    ranks_BN = torch.arange(responses).expand(scores_BN.shape)
    return tuna_loss(scores_BN, ranks=ranks_BN.to(scores_BN.device)) + output.loss
