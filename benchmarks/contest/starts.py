"""Where a new adapter of a stack starts, if not from random A and B = 0.

Shape suffixes: R rank of the new adapter, K sum of the ranks below, I and O sizes of a layer's input and output.
"""

from __future__ import annotations

from typing import Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from tuna_peft.models.stack.adapters import adapter_names

Start = Literal["down", "mirrored"]


@torch.no_grad()
def start_from_below(model: PeftModel, start: Start) -> None:
    """Starts the top adapter from the sum of the adapters below; the function of the model does not change.

    Args:
        start: `down`: A gets the first right singular vectors of the sum, with the norm of PEFT's random rows, and B
            is zero. `mirrored`: the first R / 2 components of the sum, plus the same with B negated.
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
        left_OK, right_KI = q_OK @ u, (p_IK @ vh.T).T
        down_RI, up_OR = layer.lora_A[top].weight, layer.lora_B[top].weight
        if start == "down":
            count = min(len(down_RI), len(right_KI))
            down_RI[:count] = right_KI[:count] / 3**0.5
            continue
        half = min(len(down_RI) // 2, len(singular_K))
        root = (singular_K[:half] / layer.scaling[top]).sqrt()
        down_RI[:half] = down_RI[half : 2 * half] = root[:, None] * right_KI[:half]
        up_OR[:, :half] = left_OK[:, :half] * root
        up_OR[:, half : 2 * half] = -up_OR[:, :half]
