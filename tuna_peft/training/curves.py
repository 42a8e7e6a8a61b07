"""The training curves of a stage as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# One panel each; a panel without any of its series in the log is left out.
_PANELS = {
    "loss": ["loss", "rank_loss", "mle_loss", "eval_loss"],
    "share of pairs": ["ranking_accuracy", "margin_satisfaction", "eval_ranking_accuracy", "mean_token_accuracy"],
    "score v by rank": [f"scores/rank_{rank}" for rank in range(8)],
    "learning rate": ["learning_rate"],
}


def save_curves(log_history: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> bool:
    """Draws what `Trainer` logged over the steps; False, and no file, where there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def series(name: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[name]) for entry in log_history if name in entry]

    panels = {label: [name for name in names if series(name)] for label, names in _PANELS.items()}
    panels = {label: names for label, names in panels.items() if names}
    if not panels:
        return False
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in names:
            points = series(name)
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None, linewidth=1.4)
        axes.set(title=label, xlabel="step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize="x-small")
    figure.suptitle(title)
    aside = Path(path).with_suffix(".partial.png")
    figure.savefig(aside, dpi=120)
    aside.replace(path)
    return True
