"""From a `PackedBatch` to the log-probability of every response.

`TunaTrainer`, the ranking evaluation and the teacher all call `response_logps`, the last two through `stream_logps`.

Shape suffixes: see `tuna_peft.data.batch`; D hidden size.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from tuna_peft.data.batch import PackedBatch
from tuna_peft.data.collate import RankedCollator
from tuna_peft.errors import UserError
from tuna_peft.models.forward.logps import output_head, token_logps
from tuna_peft.models.forward.prefix import model_inputs
from tuna_peft.models.workers import split


@dataclass
class ResponseLogps:
    """Summed log-probabilities and lengths of the responses of a batch.

    Attributes:
        sums_BN: `(B, N)` summed log-probability of each response, in nats; 0 where there is no response.
        lengths_BN: `(B, N)` tokens that carry loss, EOS included; 0 where there is no response.
    """

    sums_BN: torch.Tensor
    lengths_BN: torch.Tensor

    def normalised(self, length_penalty: float = 1.0) -> torch.Tensor:
        """`(B, N)` length-normalized log-probabilities v = sum / length**beta (equation 2 of the paper)."""
        return self.sums_BN / self.lengths_BN.clamp_min(1) ** length_penalty


def response_logps(model: torch.nn.Module, batch: PackedBatch) -> ResponseLogps:
    """One forward pass of `model` over a batch.

    Args:
        model: A causal LM, a `PeftModel` around one, or either wrapped for distributed training.
        batch: On the model's device.

    Raises:
        UserError: The model's attention or output layer is not supported, see `model_inputs` and `output_head`.
    """
    inputs, predictors_R = model_inputs(unwrap(model), batch)
    hidden_BTD, _ = final_hidden_states(model, **inputs)
    logps_R = token_logps(hidden_BTD.flatten(0, 1)[predictors_R], output_head(unwrap(model)), batch.targets_R)
    shape, responses_P = batch.ranks_BN.shape, batch.responses_P
    sums = logps_R.new_zeros(shape.numel()).index_add(0, responses_P, logps_R[batch.predictions_P])
    # Not `bincount`: it needs the largest index on the CPU, which makes the CPU wait for the GPU.
    lengths = batch.ranks_BN.new_zeros(shape.numel()).index_add(0, responses_P, torch.ones_like(responses_P))
    return ResponseLogps(sums.view(shape), lengths.view(shape))


@torch.no_grad()
def stream_logps(
    model: torch.nn.Module,
    collate: RankedCollator,
    rows: Mapping[Any, dict[str, Any]],
    batches: Iterable[Sequence[Any]],
) -> Iterator[tuple[Sequence[Any], ResponseLogps]]:
    """Scores rows batch by batch, without gradients; a batch that runs out of memory is split into two halves.

    Batches are divided among the processes of a run, see `tuna_peft.models.workers`.

    Args:
        model: As in `response_logps`.
        collate: Turns rows into a batch.
        rows: Encoded rows by name (any key).
        batches: Names of the rows of each batch, the longest rows first, so that running out of memory shows at once.

    Yields:
        The names of some rows, and the result of `response_logps` for them, on the CPU.

    Raises:
        UserError: One row alone does not fit into memory.
    """
    units = ([(name, rows[name]) for name in names] for names in batches)
    yield from split(model, _scoring, units, collate=collate)


@contextlib.contextmanager
def _scoring(
    model: torch.nn.Module, collate: RankedCollator
) -> Iterator[Callable[[list[tuple[Any, dict[str, Any]]]], Iterator[tuple[Sequence[Any], ResponseLogps]]]]:
    """See `tuna_peft.models.workers.Work`: a unit is a batch of rows with their names."""
    device = next(model.parameters()).device
    model.eval()

    def score(batch: list[tuple[Any, dict[str, Any]]]) -> Iterator[tuple[Sequence[Any], ResponseLogps]]:
        queue = deque([batch])
        while queue:
            named = queue.popleft()
            try:
                logps = response_logps(model, collate([row for _, row in named]).to(device))
            except torch.OutOfMemoryError as error:
                if len(named) == 1:
                    tokens = len(collate.pack(named[0][1]).tokens)
                    raise UserError(
                        f"a prompt with its responses ({tokens} tokens) does not fit into memory",
                        fix="Quantize the model, or leave such prompts out.",
                    ) from error
                half = len(named) // 2
                queue.extendleft([named[half:], named[:half]])
                continue
            yield [name for name, _ in named], ResponseLogps(logps.sums_BN.cpu(), logps.lengths_BN.cpu())

    yield score


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model without the wrapper of distributed training (DDP, DeepSpeed)."""
    return getattr(model, "module", model)


def without_peft(model: torch.nn.Module) -> Any:
    """The causal LM itself; its LoRA layers stay inside."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def final_hidden_states(model: torch.nn.Module, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, T, D)` hidden states after the last norm, and `(B, V)` the model's own logits at the last position.

    The whole model is called, because wrappers (autocast, DDP) act on its `forward`; it computes the logits of one
    position only, and a hook keeps the hidden states. `output_hidden_states=True` would keep those of every layer, and
    under accelerate's mixed precision convert them to fp32.
    """
    hidden: list[torch.Tensor] = []
    backbone = without_peft(unwrap(model)).get_decoder()  # OPT's lies inside its `base_model`, which is not called
    hook = backbone.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    try:
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits
    finally:
        hook.remove()
    return hidden[0], logits[:, -1]
