"""KL divergence and top-1 agreement between an exported model and the unmerged adapters. `check` calls it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

# Rows of logits converted to float64 at a time: at a vocabulary of 128k, 64 rows are 65 MB.
_ROWS = 64


@dataclass(frozen=True)
class Divergence:
    """KL(reference || other) over the next-token distributions after every token of some prompts.

    Attributes:
        kl_mean: Mean over tokens, in nats.
        kl_max: Maximum over tokens, in nats.
        top1_agreement: Share of tokens after which both models predict the same next token.
        tokens: Number of tokens.
    """

    kl_mean: float
    kl_max: float
    top1_agreement: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"mean {self.kl_mean:.2e}, largest {self.kl_max:.2e} nats; "
            f"same next token in {self.top1_agreement:.1%} of {self.tokens:,} tokens"
        )


def divergence(
    reference_logits: Iterable[torch.Tensor], other_model: torch.nn.Module, token_batches: Iterable[torch.Tensor]
) -> Divergence:
    """Compares a loaded model with the logits of another one, batch by batch.

    Args:
        reference_logits: Logits `(batch, seq, vocabulary)` of the model to compare with, one tensor per batch.
        other_model: The causal LM to measure, with the same vocabulary.
        token_batches: Token ids `(batch, seq)` without padding, for example one prompt per batch.

    Raises:
        ValueError: No tokens.
    """
    kls, agreements = [], []
    for expected, found in zip(reference_logits, iter_logits(other_model, token_batches), strict=True):
        for p, q in zip(expected.flatten(0, 1).split(_ROWS), found.flatten(0, 1).split(_ROWS), strict=True):
            # In float64, because rounding of log-probabilities in fp32 would hide a KL of 1e-10.
            logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
            kls.append((logp.exp() * (logp - logq)).sum(-1))
            agreements.append(p.argmax(-1) == q.argmax(-1))
    if not kls:
        raise ValueError("no tokens to compare on")
    kl, agreement = torch.cat(kls), torch.cat(agreements)
    return Divergence(kl.mean().item(), kl.max().item(), agreement.double().mean().item(), kl.numel())


@torch.no_grad()
def iter_logits(model: torch.nn.Module, token_batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The model's logits `(batch, seq, vocabulary)`, on the CPU, one batch after the other."""
    # Offloaded weights are meta tensors; their hooks accept tokens on any device.
    device = next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
    for tokens in token_batches:
        yield model(input_ids=tokens.to(device)).logits.cpu()
