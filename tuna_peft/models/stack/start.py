"""Starts a new adapter from the stack below it: `lora.start: below`.

LoRA starts with B = 0, so that A has no gradient at first and the model does not change. A new adapter of a stack can
have both: factors that are not zero, and a model that does not change.

Shape suffixes: R rank of the new adapter, K sum of the ranks below, I and O sizes of a layer's input and output.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from tuna_peft.models.stack.adapters import adapter_names


@torch.no_grad()
def start_from_below(model: PeftModel) -> None:
    """Gives the top adapter the R / 2 largest components of the sum below it, and the same components negated.

    The two halves add up to zero, so the function of the model stays the same up to rounding. Their gradients by B are
    equal and those by A are opposite, so a step changes their sum by both. Layers without an adapter below keep the
    usual start.
    """
    *below, top = adapter_names(model)
    for layer in model.modules():
        names = [name for name in below if isinstance(layer, LoraLayer) and name in layer.lora_A]
        if not names or top not in layer.lora_A:
            continue
        down_KI = torch.cat([layer.lora_A[name].weight.float() for name in names])
        up_OK = torch.cat([layer.lora_B[name].weight.float() * layer.scaling[name] for name in names], dim=1)
        # The SVD of up @ down from those of its factors: nothing of the layer's size is decomposed.
        q_OK, r_KK = torch.linalg.qr(up_OK)
        p_IK, s_KK = torch.linalg.qr(down_KI.T)
        u, singular_K, vh = torch.linalg.svd(r_KK @ s_KK.T)
        down_RI, up_OR = layer.lora_A[top].weight, layer.lora_B[top].weight
        half = min(len(down_RI) // 2, len(singular_K))
        root = (singular_K[:half] / layer.scaling[top]).sqrt()
        down_RI[:half] = down_RI[half : 2 * half] = root[:, None] * (p_IK @ vh.T).T[:half]
        up_OR[:, :half] = (q_OK @ u)[:, :half] * root
        up_OR[:, half : 2 * half] = -up_OR[:, :half]
