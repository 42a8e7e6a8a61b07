"""Pre-training: AdamW on the endless text of `documents`, for a given number of tokens, on a CPU."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from pico_world import documents, families, probe, template, tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PEAK_LEARNING_RATE = 2e-3
WARMUP_SHARE = 0.02
TOKENS_PER_BATCH = 4096
PROMPT_WEIGHT = 0.1
"""Weight of a prompt token in the loss: prompts are random words, there is little in them to learn."""

_BATCHES_PER_POOL = 32
_SAVE_EVERY_S = 180.0
_REPORT_EVERY_S = 30.0
_PROBE_EVERY_S = 300.0


def new_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """An untrained LLaMA of 3.3 million parameters with grouped-query attention and a tied head.

    Every input width is a multiple of 64, the block size of NF4.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=tokenizer.MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    # For rows as short as these, plain attention is faster on a CPU than the fused kernel.
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def batches(
    text_tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless batches `(input_ids, targets, weights)`, each `(rows, length)`.

    One document is one row, so that no document sees another and every one begins with `<s>` as at inference. Rows of
    like length share a batch, which leaves almost no padding; padding is at the end, has weight 0, and no token
    attends to it.
    """
    rng = Random(seed)
    texts = documents.stream(seed)
    response_heading = text_tokenizer.convert_tokens_to_ids(template.RESPONSE_HEADING)
    while True:
        pool = list(itertools.islice(texts, _BATCHES_PER_POOL * TOKENS_PER_BATCH // 24))
        rows = text_tokenizer([document.head + document.body for document in pool]).input_ids
        rows.sort(key=len)
        chunks = list(_chunks(rows))
        rng.shuffle(chunks)
        for chunk in chunks:
            yield _tensors(chunk, text_tokenizer, response_heading)


def _chunks(rows: list[list[int]]) -> Iterator[list[list[int]]]:
    """Cuts rows sorted by length into batches of few different shapes, for which the CPU kernels are set up once."""
    while rows:
        width = _width(rows[-1])
        count = TOKENS_PER_BATCH // width // 16 * 16
        if count <= len(rows):
            yield rows[-count:]
        rows = rows[:-count]


def _width(row: list[int]) -> int:
    """The length of the row with its end token, rounded up."""
    return -(-len(row) // 8) * 8


def _tensors(
    chunk: list[list[int]], text_tokenizer: PreTrainedTokenizerFast, response_heading: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = _width(chunk[-1]) + 1
    ids = torch.full((len(chunk), width), text_tokenizer.pad_token_id)
    weights = torch.zeros(len(chunk), width)
    for i, row in enumerate(chunk):
        ids[i, : len(row) + 1] = torch.tensor([*row, text_tokenizer.eos_token_id])
        head = row.index(response_heading) + 1 if response_heading in row else 1
        weights[i, :head] = PROMPT_WEIGHT
        weights[i, head : len(row) + 1] = 1.0
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]


def learning_rate(progress: float) -> float:
    """Linear warm-up, then linear to zero; `progress` runs from 0 to 1."""
    return PEAK_LEARNING_RATE * min(progress / WARMUP_SHARE, (1 - progress) / (1 - WARMUP_SHARE), 1.0)


def pretrain(text_tokenizer: PreTrainedTokenizerFast, total: int, seed: int, checkpoint: Path) -> LlamaForCausalLM:
    """Trains on `total` tokens and returns the model in float32.

    The state is kept in `checkpoint`; if that file exists, training resumes from it.
    """
    model = new_model(len(text_tokenizer), seed).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    step, tokens, before = 0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, before = state["step"], state["tokens"], state["seconds"]
    tasks = list(families.distinct(Random(seed), 20 * len(families.FAMILIES), held_out=True, label="probe"))

    begin = time.monotonic() - before
    saved = reported = probed = before
    recent: list[float] = []
    for ids, targets, weights in batches(text_tokenizer, seed + step):
        seconds = time.monotonic() - begin
        if tokens >= total:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(tokens / total)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids.numel()
        recent.append(loss.item())
        if seconds - reported > _REPORT_EVERY_S:
            reported, mean, recent = seconds, sum(recent) / len(recent), []
            left = (total - tokens) / tokens * seconds / 60
            print(f"step {step}  loss {mean:.4f}  {tokens / seconds:,.0f} tokens/s  {left:.1f} min left", flush=True)
        if seconds - probed > _PROBE_EVERY_S:
            probed = seconds
            _print_probe(model, text_tokenizer, tasks)
        if seconds - saved > _SAVE_EVERY_S:
            saved = seconds
            _save(checkpoint, model, optimizer, step=step, tokens=tokens, seconds=seconds)
    _save(checkpoint, model, optimizer, step=step, tokens=tokens, seconds=seconds)
    model.eval()
    _print_probe(model, text_tokenizer, tasks)
    return model


def _print_probe(model: LlamaForCausalLM, text_tokenizer: PreTrainedTokenizerFast, tasks: list) -> None:
    known = probe.prefers_right(model, text_tokenizer, tasks)
    print("right above slip: " + "  ".join(f"{family} {share:.2f}" for family, share in known.items()), flush=True)


def _save(checkpoint: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, **counters: float) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    aside = checkpoint.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **counters}, aside)
    os.replace(aside, checkpoint)
