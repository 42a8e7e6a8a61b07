"""Tokens and FLOPs of a group under published ways of packing, as a table: `python -m benchmarks.packing`.

Rows are made by the code of each scheme, but those of PrefixGrouper (https://arxiv.org/abs/2506.05433) are counted by
what it publishes: a group is one sequence, its prompt followed by its responses, and groups of a pass are padded to
the longest; attention runs once over the prompts and once over the responses with their prompts, padded likewise.
FLOPs are those of the layers at LLaMA-7B shape, forward and backward, nothing recomputed, attention causal; without
the head, which is no part of a packing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import ours, reference, trl_tree
from benchmarks.flops import parameters_of
from benchmarks.shapes import config_of
from benchmarks.workloads import WORKLOADS, Group

GROUPS = 2


class Cost(NamedTuple):
    """Tokens that go through the layers, and query-key pairs of attention."""

    tokens: int
    pairs: int


def _causal(queries: int, before: int = 0) -> int:
    return queries * before + queries * (queries + 1) // 2


def unique(groups: Sequence[Group]) -> Cost:
    """Every token of a prompt and of its responses once."""
    prompts, lengths = _lengths(groups)
    pairs = [
        _causal(prompt) + sum(_causal(length, prompt) for length in one)
        for prompt, one in zip(prompts, lengths, strict=True)
    ]
    return Cost(sum(prompts) + sum(map(sum, lengths)), sum(pairs))


def prefix_grouper(groups: Sequence[Group]) -> Cost:
    """By its published scheme, see above."""
    prompts, lengths = _lengths(groups)
    width = max(prompt + sum(one) for prompt, one in zip(prompts, lengths, strict=True))
    prompt, response = max(prompts), max(map(max, lengths))
    suffixes = sum(map(len, lengths))
    return Cost(len(groups) * width, len(groups) * _causal(prompt) + suffixes * _causal(response, prompt))


def _reference(groups: Sequence[Group]) -> Cost:
    rows, width = reference.batch_of(list(groups))["input_ids"].shape
    return Cost(rows * width, rows * _causal(width))


def _tree(groups: Sequence[Group]) -> Cost:
    return Cost(trl_tree.batch_of(list(groups))["input_ids"].numel(), unique(groups).pairs)


def _ours(groups: Sequence[Group]) -> Cost:
    return Cost(len(ours.batch_of(list(groups)).tokens_U), unique(groups).pairs)


def _lengths(groups: Sequence[Group]) -> tuple[list[int], list[list[int]]]:
    return [len(group["prompt_ids"]) for group in groups], [
        [len(response) for response in group["completions_ids"]] for group in groups
    ]


SCHEMES: dict[str, Callable[[Sequence[Group]], Cost]] = {
    "unique tokens": unique,
    "ours": _ours,
    "TRL's tree rows": _tree,
    "PrefixGrouper": prefix_grouper,
    "one sequence per response (reference)": _reference,
}


def main() -> None:
    """Prints the table."""
    config = config_of("7b")
    size = parameters_of(config)
    columns = [(name, workload, together) for name, workload in WORKLOADS.items() for together in (1, 2)]
    columns = [column for column in columns if column[1].varied or column[2] == 1]
    print("| |" + "".join(f" {name}{', two a pass' if together > 1 else ''} |" for name, _, together in columns))
    print("|---" * (len(columns) + 1) + "|")
    for scheme, count in SCHEMES.items():
        cells = []
        for _, workload, together in columns:
            groups = workload.groups(GROUPS, config.vocab_size)
            passes = [count(groups[start : start + together]) for start in range(0, GROUPS, together)]
            tokens, pairs = sum(one.tokens for one in passes), sum(one.pairs for one in passes)
            flops = (4.0 * size.body + 6.0 * size.adapters) * tokens
            flops += 12.0 * config.hidden_size * config.num_hidden_layers * pairs
            cells.append(f"{tokens / GROUPS:,.0f}, {flops / GROUPS / 1e12:.1f}")
        print(f"| {scheme} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
