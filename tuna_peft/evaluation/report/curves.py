"""What the trainer logged over the steps of a stage: as `curves.png` in the stage's folder and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuna_peft.evaluation.report.theme import LIGHT, mix, style

Series = dict[str, list[list[float]]]

_PANELS = {
    "loss": ["loss", "rank_loss", "mle_loss", "eval_loss"],
    "pairs in order": ["ranking_accuracy", "margin_satisfaction", "eval_ranking_accuracy"],
    "token accuracy": ["mean_token_accuracy", "eval_mean_token_accuracy"],
    "v by rank": [f"scores/rank_{rank}" for rank in range(8)],
    "learning rate": ["learning_rate"],
}
_COLORS = [LIGHT[name] for name in ("accent", "worst", "violet", "green")]


def read_curves(log_history: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """By panel and series, pairs of step and value. A panel is left out when the log has nothing for it."""
    panels: dict[str, Series] = {}
    for panel, names in _PANELS.items():
        for name in names:
            if points := [[entry["step"], entry[name]] for entry in log_history if name in entry]:
                panels.setdefault(panel, {})[name] = points
    return panels


def draw_curves(axes: Axes, series: Series) -> list[tuple[str, str]]:
    """Draws one panel, and returns the name and color of each series for a legend. Infinite values leave a gap."""
    legend = []
    for place, (name, points) in enumerate(series.items()):
        rank = name.removeprefix("scores/rank_")
        color = rank_color(place, len(series)) if rank.isdigit() else _COLORS[place % len(_COLORS)]
        legend.append((f"rank {int(rank) + 1}" if rank.isdigit() else name.replace("_", " "), color))
        axes.plot(
            *zip(*points, strict=True), color=color, label=legend[-1][0], marker="." if len(points) < 3 else None
        )
    axes.set_xlabel("step")
    return legend


def save_curves(log_history: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> bool:
    """Draws all panels into one PNG. Returns False, and writes no file, when there is nothing to draw."""
    panels = read_curves(log_history)
    if not panels:
        return False
    with style():
        figure = Figure(figsize=(4.2 * len(panels), 3.4), facecolor=LIGHT["card"])
        for axes, (panel, series) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            draw_curves(axes, series)
            axes.set_title(panel)
            if len(series) > 1:
                axes.legend(fontsize="small")
        figure.suptitle(title)
        partial = Path(path).with_suffix(".partial.png")  # a reader never sees half a picture
        figure.savefig(partial, dpi=120)
    partial.replace(path)
    return True


def rank_color(rank: int, ranks: int) -> str:
    """From the color of the best response to that of the worst."""
    return mix("best", "worst", rank / max(ranks - 1, 1))
