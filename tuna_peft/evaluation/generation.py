"""Greedy responses, batched by length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate_responses(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    description: str = "generating",
) -> list[str]:
    """One greedy response per prompt, in the order of the prompts.

    Args:
        model: Any causal LM, with or without adapters.
        prompts: Token ids, as training saw them (see `tuna_peft.data.tokenize`).
        max_new_tokens: Where a response that does not end by itself is cut.

    Returns:
        The texts, without special tokens.
    """
    model.eval()
    device = next(model.parameters()).device
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(prompts)
    for start in tqdm(
        range(0, len(order), batch_size), desc=description, leave=False, disable=len(order) <= batch_size
    ):
        chosen = order[start : start + batch_size]
        width = len(prompts[chosen[0]])
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in chosen], device=device)
        # By length, not by id: pad may be EOS.
        seen = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=device)
        generated = model.generate(
            input_ids=ids, attention_mask=seen, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True,
            temperature=None, top_p=None, top_k=None, pad_token_id=pad, eos_token_id=eos,
        )  # fmt: skip
        for i, tokens in zip(chosen, generated[:, width:].tolist(), strict=True):
            ended = tokens[: tokens.index(eos)] if eos in tokens else tokens
            texts[i] = tokenizer.decode(ended, skip_special_tokens=True).strip()
    return texts
