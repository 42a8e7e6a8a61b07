"""How the next token is chosen: the most likely one, or a sample by the Gumbel-max trick.

`stream_responses` calls the function that `chooser` returns once per step.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Chooser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def chooser(temperature: float, top_p: float) -> Chooser:
    """A function that takes logits `(B, V)`, keys `(B,)` and steps `(B,)`, and returns the next tokens `(B,)`.

    Args:
        temperature: 0 is greedy.
        top_p: Nucleus sampling: only the smallest set of tokens with at least this total probability.
    """
    if temperature == 0:
        return lambda logits_BV, keys_B, steps_B: logits_BV.argmax(-1)

    def sample(logits_BV: torch.Tensor, keys_B: torch.Tensor, steps_B: torch.Tensor) -> torch.Tensor:
        logits_BV = logits_BV.float() / temperature
        if top_p < 1:
            sorted_BV, order_BV = torch.sort(logits_BV.softmax(-1), dim=-1, descending=True, stable=True)
            beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # the more likely tokens already add up to top_p
            logits_BV = logits_BV.masked_fill(beyond_BV.scatter(-1, order_BV, beyond_BV), -torch.inf)
        _add_gumbel_noise(logits_BV, keys_B, steps_B)
        return logits_BV.argmax(-1)

    return sample


def _add_gumbel_noise(logits_BV: torch.Tensor, keys_B: torch.Tensor, steps_B: torch.Tensor) -> None:
    """Adds standard Gumbel noise in place, each number a hash of (key, step, token); the argmax is then a sample.

    The hash is SplitMix64 (Steele et al. 2014) of a counter. Unlike `torch.Generator` it has no state that depends on
    the rest of the batch, and CPU and GPU give the same numbers.
    """
    vocabulary = logits_BV.shape[1]
    # A CPU computes a block of the vocabulary at a time, whose intermediate results stay in its cache.
    block = max(_NOISE_BLOCK // len(logits_BV), 1) if logits_BV.device.type == "cpu" else vocabulary
    first_B1 = (keys_B + (steps_B * vocabulary + 1) * _GOLDEN)[:, None]
    for start in range(0, vocabulary, block):
        logits = logits_BV[:, start : start + block]
        bits = torch.arange(start, start + logits.shape[1], device=keys_B.device) * _GOLDEN + first_B1
        bits ^= _shifted(bits, 30)
        bits *= _MIX1
        bits ^= _shifted(bits, 27)
        bits *= _MIX2
        bits ^= _shifted(bits, 31)
        uniform = _shifted(bits, 40).float().add_(0.5).mul_(2.0**-24)
        logits -= uniform.neg_().log1p_().neg_().log_()


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right, which fills with zeros; torch's shift repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


# Numbers of noise that a CPU computes at a time: 512 KiB of 64-bit integers.
_NOISE_BLOCK = 2**16
# SplitMix64's constants as signed 64-bit integers; products wrap around.
_GOLDEN, _MIX1, _MIX2 = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
