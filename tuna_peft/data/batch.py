"""`PackedBatch`: the tensors of one forward and backward pass, from the collator to the loss.

`tuna_peft.data.collate` makes it; the forward pass (`tuna_peft.models.forward`), `TunaTrainer`, the ranking evaluation
and the teacher read it.

Shape suffixes:
    B: prompts, one packed sequence each    N: responses of a prompt    T: tokens of a packed sequence, with padding
    S: segments of a packed sequence, with the padding as the last one
    U: tokens of the batch without padding  K: attention keys, gathered segment by segment
    R: predicted tokens, each once          P: predicted tokens, once for each response that contains them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from tuna_peft.limits import PAD_TO

_BY_ROW = ("limits_BSS", "ranks_BN", "mle_BN", "grades_BN", "row_hashes_B")
_BY_TOKEN = ("input_ids_BT", "position_ids_BT", "segment_ids_BT")


@dataclass(eq=False)  # comparing tensors gives tensors
class PackedBatch:
    """B prompts, each packed into one sequence with all its responses; tokens that responses share appear once.

    A segment is an unbranched run of tokens in the tree that a packed sequence holds, see `tuna_peft.data.collate`.
    All tensors are int64 unless the list says otherwise.

    Attributes:
        input_ids_BT: `(B, T)` tokens.
        position_ids_BT: `(B, T)` position of each token in its own response's sequence (its depth in the tree).
        segment_ids_BT: `(B, T)` the segment of each token; padding has the last one, S - 1.
        limits_BSS: `(B, S, S)` int32: a token of segment a sees the tokens of segment b at positions below
            `limits_BSS[:, a, b]`. With causality, this defines the attention mask.
        tokens_U: `(U,)` where the tokens that are not padding are among the flattened `B * T`.
        q_offsets: `(segments of the batch + 1,)` int32: where each segment starts among the U tokens, padding segments
            left out. With `k_offsets` and `keys_K` this says the same as `limits_BSS`, in the form that
            variable-length attention kernels take.
        k_offsets: `(segments of the batch + 1,)` int32: where the keys of each segment start among the K.
        keys_K: `(K,)` places of the keys among the U tokens, in the order of their positions, the segment itself last.
        predictors_R: `(R,)` index among the U tokens of the token whose hidden state predicts.
        targets_R: `(R,)` the token that is predicted.
        predictions_P: `(P,)` index among the R predictions.
        responses_P: `(P,)` the response which that prediction belongs to, as an index among the flattened `B * N`.
        ranks_BN: `(B, N)` 0 is best, equal where tied, -1 where there is no ranked response.
        mle_BN: `(B, N)` bool: which responses the SFT loss (NLL) term covers.
        grades_BN: `(B, N)` fp32: the scores of the data, higher is better; 0 where there is none.
        row_hashes_B: `(B,)` a hash of the tokens of each prompt and its responses.
    """

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    segment_ids_BT: torch.Tensor
    limits_BSS: torch.Tensor
    tokens_U: torch.Tensor
    q_offsets: torch.Tensor
    k_offsets: torch.Tensor
    keys_K: torch.Tensor
    predictors_R: torch.Tensor
    targets_R: torch.Tensor
    predictions_P: torch.Tensor
    responses_P: torch.Tensor
    ranks_BN: torch.Tensor
    mle_BN: torch.Tensor
    grades_BN: torch.Tensor
    row_hashes_B: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        """A new batch with `change` applied to every tensor."""
        return PackedBatch(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on another device; accelerate's data loader calls this for anything that has a `to`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory; PyTorch's data loader calls this for anything that has a `pin_memory`."""
        return self.map(torch.Tensor.pin_memory)

    def halves(self) -> list[PackedBatch]:
        """Two batches with half of the prompts each, on the same device; the batch alone when it has one prompt."""
        b = len(self.ranks_BN)
        return [self] if b == 1 else [self.part(0, b // 2), self.part(b // 2, b)]

    def part(self, first: int, last: int) -> PackedBatch:
        """The prompts from `first` up to and without `last`, on the same device, without the padding that they share.

        A part of one prompt depends on that prompt alone, whatever batch it came from (but for the width of N).
        """
        n, width = self.ranks_BN.shape[1], self.input_ids_BT.shape[1]
        inside_P = (self.responses_P >= first * n) & (self.responses_P < last * n)
        # Responses that share tokens share predictions too; each is kept once, in its order.
        kept, predictions_P = self.predictions_P[inside_P].unique(return_inverse=True)
        longest = int((self.segment_ids_BT[first:last] < self.limits_BSS.shape[1] - 1).sum(1).max())
        columns = slice(longest + -longest % PAD_TO)
        rows = {name: getattr(self, name)[first:last] for name in _BY_ROW}
        rows |= {name: getattr(self, name)[first:last, columns] for name in _BY_TOKEN}
        keys = segment_keys(rows["segment_ids_BT"], rows["position_ids_BT"], rows["limits_BSS"])
        return PackedBatch(
            predictors_R=self.predictors_R[kept] - (self.tokens_U < first * width).sum(),
            targets_R=self.targets_R[kept],
            predictions_P=predictions_P,
            responses_P=self.responses_P[inside_P] - first * n,
            **rows,
            **{name: value.to(kept.device) for name, value in keys.items()},
        )


def segment_keys(
    segment_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor, limits_BSS: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The keys that each segment of a batch attends to, for attention that skips padding and hidden keys.

    Args:
        segment_ids_BT, position_ids_BT, limits_BSS: See `PackedBatch`.

    Returns:
        `tokens_U`, `q_offsets`, `k_offsets` and `keys_K` of `PackedBatch`; `tokens_U` on the device of the arguments,
        the others on the CPU.
    """
    is_token_BT = segment_ids_BT < limits_BSS.shape[1] - 1
    q_offsets, k_offsets = [0], [0]
    keys: list[int] = []
    columns = is_token_BT.sum(1).tolist(), segment_ids_BT.tolist(), position_ids_BT.tolist(), limits_BSS.tolist()
    for length, ids, positions, limits in zip(*columns, strict=True):
        row = q_offsets[-1]  # where this sequence starts among the U tokens
        starts = [token for token in range(length) if token == 0 or ids[token] != ids[token - 1]]
        start_of = {ids[start]: start for start in starts}
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            own = ids[start]
            # Ancestors have lower numbers than their branches, so this goes from the root down.
            for other, limit in enumerate(limits[own]):
                if limit and other != own:
                    first = start_of[other]
                    keys += range(row + first, row + first + limit - positions[first])
            keys += range(row + start, row + end)
            q_offsets.append(row + end)
            k_offsets.append(len(keys))
    return {
        "tokens_U": is_token_BT.flatten().nonzero().squeeze(-1),
        "q_offsets": torch.tensor(q_offsets, dtype=torch.int32),
        "k_offsets": torch.tensor(k_offsets, dtype=torch.int32),
        "keys_K": torch.tensor(keys),
    }
