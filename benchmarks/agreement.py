"""A check before every measurement: on a tiny fp32 model, each arm has the loss and gradients of the reference."""

from __future__ import annotations

import torch

from benchmarks.arms import ARMS, to_device
from benchmarks.shapes import build, config_of, set_fused
from benchmarks.workloads import Group, Workload

# fp32 rounds each of some thousand operations in sequence, forward and back: 60 * 1e-7, and four times that.
TOLERANCE = 2.5e-5


class Disagreement(RuntimeError):
    """The loss or gradient of an arm differs from the reference."""


def require_agreement(names: list[str], *, device: str = "cpu", tolerance: float = TOLERANCE) -> dict[str, float]:
    """The relative difference of each arm from the reference, the larger of loss and gradient.

    Only arms that compute the Tuna loss are compared.

    Gradients are compared as one vector, by the norm of their difference.

    Raises:
        Disagreement: A difference is above the tolerance.
    """
    model = build("tiny", device, quantize=False, dtype=torch.float32)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = Workload("agreement", prompt=24, varied=True, mean=40).groups(2, config_of("tiny").vocab_size)

    def compute(name: str, groups: list[Group]) -> tuple[torch.Tensor, torch.Tensor]:
        arm = ARMS[name]
        set_fused(model, arm.fused)
        batch = to_device(arm.batch(groups), device)
        loss = arm.loss(model, device)(batch)
        gradients = torch.autograd.grad(loss, parameters)
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    loss, gradient = compute("reference", groups)
    differences = {}
    for name in names:
        if name == "reference" or not ARMS[name].agrees:
            continue
        other_loss, other_gradient = compute(name, groups)
        worst = max(
            float((other_loss - loss).abs() / loss.abs()),
            float((other_gradient - gradient).norm() / gradient.norm()),
        )
        if not worst <= tolerance:
            raise Disagreement(
                f"{name} differs from the reference by {worst:.1e} (limit {tolerance:.0e}): nothing is measured"
            )
        differences[name] = worst
    return differences
