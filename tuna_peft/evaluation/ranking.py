"""The task `ranking`: does the model give better responses a higher probability? `run.tasks` calls it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tuna_peft.data.collate import RankedCollator
from tuna_peft.evaluation.bootstrap import mean_metric
from tuna_peft.evaluation.ranking_metrics import Pair, kendall_tau_b, ndcg, pairs_of, reciprocal_rank, top1_hit
from tuna_peft.evaluation.results import Exclusion, Metric, PromptResult, TaskResult
from tuna_peft.models.forward.scoring import stream_logps
from tuna_peft.progress import Progress

MAIN = "pair_accuracy"

# Shares of pairs, by name: the condition that is counted, and the pairs among which it is counted.
_OVER_PAIRS: dict[str, tuple[Callable[[Pair], bool], Callable[[Pair], bool]]] = {
    MAIN: (lambda pair: pair.v_gap > 0, lambda pair: True),
    "pair_accuracy_better_is_longer": (lambda pair: pair.v_gap > 0, lambda pair: pair.length_ratio > 1),
    "pair_accuracy_better_is_shorter": (lambda pair: pair.v_gap > 0, lambda pair: pair.length_ratio < 1),
    "prefers_longer": (lambda pair: (pair.v_gap > 0) == (pair.length_ratio > 1), lambda pair: pair.length_ratio != 1),
    "better_is_longer": (lambda pair: pair.length_ratio > 1, lambda pair: pair.length_ratio != 1),
}

_OVER_PROMPTS = {"kendall_tau_b": kendall_tau_b, "ndcg": ndcg, "top1_hit": top1_hit, "mrr": reciprocal_rank}

# Limits of the groups by length: tokens of the better response / tokens of the worse one.
_LENGTH_RATIOS = (0.5, 0.8, 1.25, 2.0)


def evaluate_ranking(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    batch_size: int = 16,
    margin: float = 0.1,
    length_penalty: float = 1.0,
    description: str = "ranking",
) -> TaskResult:
    """Scores every response of `rows` by its length-normalised log-probability v and compares v with the ranks.

    Args:
        model: Any causal LM, with or without adapters.
        tokenizer: Its tokenizer.
        rows: Tokenized ranked data, see `tuna_peft.data.tokenize.encode_dataset`.
        batch_size: Number of prompts in a batch.
        margin: For `margin_satisfaction`: the least difference in v for each step in rank.
        length_penalty: v is the summed log-probability divided by length to this power.

    Returns:
        `pair_accuracy` over untied pairs (the main metric), also where the better response is longer and where it is
        shorter; `margin`, the mean of v of the better response minus v of the worse one over these pairs, in nats per
        token; `margin_satisfaction`; `prefers_longer`, how often v prefers the longer of two responses, and
        `better_is_longer`, how often it is the better one; `kendall_tau_b`, `ndcg`, `top1_hit`, `mrr` as means over
        prompts. Groups hold `pair_accuracy` by how much longer the better response is.
    """
    model.eval()
    prompts: list[PromptResult] = []
    pairs: list[list[Pair]] = []
    failed: list[str] = []
    for row, v, lengths in _scored(model, tokenizer, rows, batch_size, length_penalty, description):
        if not all(map(math.isfinite, v)):
            failed.append(row["id"])
            continue
        prompts.append(_prompt_result(row, v, lengths, tokenizer))
        pairs.append(pairs_of(v, row["ranks"], lengths))
    metrics = {name: _pair_metric(pairs, *conditions) for name, conditions in _OVER_PAIRS.items()}
    gaps = [[pair.v_gap for pair in of_prompt] for of_prompt in pairs]
    metrics["margin"] = mean_metric([sum(of_prompt) / len(of_prompt) for of_prompt in gaps], list(map(len, gaps)))
    metrics["margin_satisfaction"] = _pair_metric(pairs, lambda pair: pair.v_gap >= margin * pair.rank_gap)
    metrics |= {name: mean_metric([prompt.scores[name] for prompt in prompts]) for name in _OVER_PROMPTS}
    untied = [prompt.id for prompt in prompts if prompt.scores["kendall_tau_b"] is None]
    left_out = {
        "a response has no finite log-probability": failed,
        "kendall_tau_b only: every response has the same v": untied,
    }
    excluded = [Exclusion.of(reason, names) for reason, names in left_out.items() if names]
    return TaskResult("ranking", MAIN, metrics, prompts, _by_length(pairs), excluded)


def _scored(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    batch_size: int,
    length_penalty: float,
    description: str,
) -> list[tuple[dict[str, Any], list[float], list[int]]]:
    """Each row with v and length of its responses, in the order of the rows."""
    encoded = dict(enumerate(rows))
    # Sorted by length, because similar lengths in a batch need less padding.
    order = sorted(encoded, key=lambda i: -sum(map(len, encoded[i]["completions_ids"])))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    scored: list[Any] = [None] * len(rows)
    with Progress(description, len(rows), "prompts") as progress:
        for chosen, logps in stream_logps(model, RankedCollator(int(tokenizer.pad_token_id)), encoded, batches):
            values = logps.normalised(length_penalty).tolist(), logps.lengths_BN.tolist()
            for i, v, tokens in zip(chosen, *values, strict=True):
                count = len(encoded[i]["ranks"])
                scored[i] = (encoded[i], v[:count], tokens[:count])
            progress.update(len(chosen))
    return scored


def _prompt_result(
    row: dict[str, Any], v: list[float], lengths: list[int], tokenizer: PreTrainedTokenizerBase
) -> PromptResult:
    decode = partial(tokenizer.decode, skip_special_tokens=True)

    def response(k: int) -> str:
        return decode(row["completions_ids"][k][row["completion_skips"][k] :]).strip()

    ranks, pairs = row["ranks"], pairs_of(v, row["ranks"], lengths)
    scores: dict[str, float | None] = {MAIN: sum(pair.v_gap > 0 for pair in pairs) / len(pairs)}
    scores |= {name: metric(v, ranks) for name, metric in _OVER_PROMPTS.items()}
    return PromptResult(
        id=row["id"],
        prompt=decode(row["prompt_ids"]),
        response=response(v.index(max(v))),
        scores=scores,
        weight=len(pairs),
        references=[response(0)],
        details={"v": [round(value, 5) for value in v], "ranks": ranks, "lengths": lengths},
    )


def _pair_metric(
    pairs: Sequence[Sequence[Pair]],
    right: Callable[[Pair], bool],
    counted: Callable[[Pair], bool] = lambda pair: True,
) -> Metric:
    """The share of `right` pairs among the `counted` ones, with an interval over prompts."""
    kept = [[pair for pair in of_prompt if counted(pair)] for of_prompt in pairs]
    shares = [sum(map(right, of_prompt)) / len(of_prompt) if of_prompt else None for of_prompt in kept]
    return mean_metric(shares, [len(of_prompt) for of_prompt in kept])


def _by_length(pairs: Sequence[Sequence[Pair]]) -> dict[str, dict[str, Metric]]:
    """`pair_accuracy` of pairs whose better response is much shorter, ..., much longer than the worse one."""
    groups = {}
    for low, high in zip((0.0, *_LENGTH_RATIOS), (*_LENGTH_RATIOS, math.inf), strict=True):
        inside = [[pair for pair in of_prompt if low <= pair.length_ratio < high] for of_prompt in pairs]
        accuracy = _pair_metric(inside, lambda pair: pair.v_gap > 0)
        groups[f"better / worse length: {low:g} to {high:g}"] = {MAIN: accuracy}
    return groups
