"""TRL's tree rows (`trl.experimental.async_grpo`, TRL 1.16): its other packing beside pairs, to compare the cost.

A `TreeRow` computes what samples begin with once, as our packed sequences do. Its head computes log-probabilities and
entropy at every position. TRL's attention is FlashAttention 3 from the Hub; here its segments go through the kernels
that ours use, so packing and head are compared, not kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.trl_pairs import fuse_head
from benchmarks.workloads import Group
from tuna_peft.models.forward.segments import Segments, placeholder_mask, use_segments

try:
    from trl.experimental.async_grpo.packing import TreeRow
except ImportError:  # before TRL 1.16
    TreeRow = None  # type: ignore[assignment,misc]


def batch_of(groups: list[Group]) -> dict[str, Any]:
    """One row of all groups, as TRL's collator makes it.

    Raises:
        ImportError: TRL is older than 1.16.
    """
    if TreeRow is None:
        raise ImportError("tree rows came with TRL 1.16")
    row = TreeRow()
    for index, group in enumerate(groups):
        for response in group["completions_ids"]:
            ids = [*group["prompt_ids"], *response]
            row.add(
                {
                    "input_ids": torch.tensor(ids),
                    "completion_mask": torch.tensor([0] * len(group["prompt_ids"]) + [1] * len(response)),
                    "old_log_probs": torch.zeros(len(ids)),
                    "advantage": 1.0,
                    "group_id": index,
                }
            )
    packed = row.pack()
    keep = ("input_ids", "position_ids", "shift_labels", "tree_kv_index", "token_index")
    # Lists stay on the CPU on every device.
    offsets = {key: packed[f"tree_cu_seqlens_{key}"].tolist() for key in ("q", "k")}
    longest = int(packed["tree_max_seqlens"].max())
    return {key: packed[key][None] for key in keep} | {"offsets": offsets, "longest": longest}


def loss_of(model: Any, batch: dict[str, Any], responses: int) -> torch.Tensor:
    """The policy gradient with equal advantages: its value means nothing here, its cost is that of GRPO."""
    use_segments(model.get_base_model())
    fuse_head(model)
    device = batch["input_ids"].device
    where = "cpu" if device.type == "meta" else device  # their values decide how many kernel calls run
    q, k = (torch.tensor(batch["offsets"][key], dtype=torch.int32, device=where) for key in ("q", "k"))
    outputs = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], shift_labels=batch["shift_labels"],
        attention_mask=placeholder_mask(device), segments=Segments(q, k, batch["tree_kv_index"][0], batch["longest"]),
        fused_lm_head=True, use_cache=False,
    )  # fmt: skip
    logps = outputs.log_probs.flatten()[batch["token_index"][0]]
    return -torch.exp(logps - logps.detach()).mean()
