"""Draws docs/figures/loss.svg and docs/figures/order.svg: `python docs/figures/make.py`. The same bytes each time."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

from tuna_peft import tuna_loss

HERE = Path(__file__).parent
BLUE, AMBER, RED, GREY = "#3f8fd2", "#e09f1f", "#c8553d", "#7b8794"


def main() -> None:
    plt.rcParams.update({
        "svg.hashsalt": "tuna_peft", "svg.fonttype": "none", "font.size": 11, "axes.spines.top": False,
        "axes.spines.right": False, "axes.edgecolor": GREY, "text.color": "#1f2933",
    })  # fmt: skip
    _save(_of_a_pair(), "loss")
    _save(_of_a_list(), "order")


def _of_a_pair() -> plt.Figure:
    """Each objective's loss of one pair, over the lead of the better response."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    leads = torch.linspace(-1, 1, 201)
    for label, colour, options in (
        ("hinge, margin 0.1 (Tuna)", BLUE, {"loss_type": "hinge"}),
        ("logistic, beta 2", AMBER, {"loss_type": "logistic"}),
        ("list_mle, beta 2", RED, {"loss_type": "list_mle"}),
    ):
        losses = [tuna_loss(torch.tensor([[float(lead), 0.0]]), **options).item() for lead in leads]
        axes.plot(leads, losses, color=colour, label=label, linewidth=2)
    axes.axvline(0.1, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlabel="v of the better response - v of the worse", ylabel="loss of the pair", ylim=(0, 1.6))
    axes.legend(frameon=False)
    return figure


def _of_a_list() -> plt.Figure:
    """Four responses as free numbers v, moved by plain gradient descent on Tuna's loss."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    v = torch.tensor([[-1.30, -1.00, -1.45, -0.90]], requires_grad=True)  # best first: the order is wrong
    path = [v.detach().clone()]
    for _ in range(40):
        (gradient,) = torch.autograd.grad(tuna_loss(v, margin=0.1), v)
        with torch.no_grad():
            v -= 0.02 * gradient
        path.append(v.detach().clone())
    for rank, (values, colour) in enumerate(zip(torch.cat(path).T, (BLUE, AMBER, RED, GREY), strict=True), 1):
        axes.plot(values, color=colour, linewidth=2)
        axes.annotate(f"rank {rank}", (len(path) + 1, values[-1]), color=colour, va="center")
    axes.set(xlabel="step", ylabel="v", xlim=(0, len(path) + 6))
    return figure


def _save(figure: plt.Figure, name: str) -> None:
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
