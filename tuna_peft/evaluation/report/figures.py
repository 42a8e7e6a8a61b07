"""The figures of the report's page: each function draws one part of `report.json` as panels, none without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from tuna_peft.evaluation.report.curves import draw_curves, rank_color
from tuna_peft.evaluation.report.table import after, heading_of, main_metrics, metric_cell
from tuna_peft.evaluation.report.theme import LIGHT, mix, new_axes, svg

Report = dict[str, Any]


@dataclass
class Panel:
    """One drawing with its heading, and names and colors for its legend."""

    drawing: Markup
    title: str
    legend: Sequence[tuple[str, str]] = ()


def stage_color(report: Report, stage: str) -> str:
    """Gray for the base, then stronger with each stage."""
    names = list(report["evaluation"])
    return mix("quiet", "accent", names.index(stage) / max(len(names) - 1, 1))


def progress(report: Report) -> list[Panel]:
    """The main metric of each task over the stages, with its interval."""
    stages = list(report["evaluation"])
    panels: list[Panel] = []
    for task, measured in main_metrics(report).items() if len(stages) > 1 else ():
        axes = new_axes(320, 190)
        places = [stages.index(stage) for stage in measured]
        axes.plot(places, [metric["value"] for metric in measured.values()], color=LIGHT["quiet"], alpha=0.5)
        for place, (stage, metric) in zip(places, measured.items(), strict=True):
            _point(axes, place, metric, stage_color(report, stage))
            axes.annotate(metric_cell(metric).text, (place, metric["value"]), (9, 5), textcoords="offset points",
                          fontsize=11.5, fontweight="bold")  # fmt: skip
        _name_places(axes, stages)
        axes.set_xlim(-0.4, len(stages) - 0.4)
        axes.margins(y=0.12)
        heading = heading_of(report, task)
        panels.append(Panel(svg(axes, f"{heading} after each stage"), heading))
    return panels


def v_by_rank(report: Report) -> list[Panel]:
    """For each stage, the density of v above the prompt's mean at each rank, the best on top; the medians joined."""
    panels = []
    densities = [d for ranks in report["v_by_rank"].values() for rank in ranks for _, d in rank["density"]]
    for stage, ranks in report["v_by_rank"].items():
        axes = new_axes(250, 44 * len(ranks) + 62)
        floors = range(len(ranks) - 1, -1, -1)
        medians = []
        for place, (floor, rank) in enumerate(zip(floors, ranks, strict=True)):
            grid, density = zip(*rank["density"], strict=True)
            heights = [floor, *(floor + 1.55 * d / max(densities) for d in density), floor]
            color = rank_color(place, len(ranks))
            axes.fill([grid[0], *grid, grid[-1]], heights, facecolor=(color, 0.3), edgecolor=color, linewidth=1.4)
            medians.append(min(max(rank["quantiles"]["0.5"], grid[0]), grid[-1]))
            axes.plot(medians[-1], floor + 0.1, "o", color=color, markersize=8, markeredgecolor=LIGHT["card"])
        axes.plot(medians, [floor + 0.1 for floor in floors], ":", color=LIGHT["ink"], linewidth=1.3)
        axes.set_yticks(floors, [f"rank {rank['rank'] + 1}" for rank in ranks])
        axes.set_xlabel("v − mean of the prompt, nats")
        axes.set_ylim(bottom=0)
        panels.append(Panel(svg(axes, f"distribution of v by rank: {stage}"), after(stage)))
    return panels


def curves(report: Report, stage: str) -> list[Panel]:
    """What the trainer logged over the steps of a stage."""
    panels = []
    for panel, series in report["curves"].get(stage, {}).items():
        axes = new_axes(250, 170)
        legend = draw_curves(axes, series)
        panels.append(Panel(svg(axes, f"{stage}: {panel} over the steps"), panel, legend if len(series) > 1 else ()))
    return panels


def by_length(report: Report) -> list[Panel]:
    """Pairwise accuracy by how much longer the better response is; and how often the longer one is preferred."""
    stages = report["by_length"]
    groups = list(dict.fromkeys(entry["group"] for entries in stages.values() for entry in entries))
    if not groups:
        return []
    axes = _share_axes(0.5)
    width = min(0.6, 0.16 * len(stages))
    for place, (stage, entries) in enumerate(stages.items()):
        offset = width * (place / max(len(stages) - 1, 1) - 0.5)
        for entry in entries:
            _point(axes, groups.index(entry["group"]) + offset, entry, stage_color(report, stage))
    _name_places(axes, [group.replace(" to inf", "+").replace(" to ", "–") for group in groups])
    axes.set_xlabel("tokens of the better / of the worse response")
    legend = [*((stage, stage_color(report, stage)) for stage in stages), ("dashed: by chance", LIGHT["soft"])]
    drawing = svg(axes, "pairwise accuracy by ratio of lengths")
    return [Panel(drawing, "pairs in the right order", legend), *_preference_for_length(report)]


def _preference_for_length(report: Report) -> list[Panel]:
    metrics = {
        stage: results["ranking"]["metrics"]
        for stage, results in report["evaluation"].items()
        if "prefers_longer" in results.get("ranking", {}).get("metrics", {})
    }
    given = [of_stage["better_is_longer"]["value"] for of_stage in metrics.values()]
    if not given or None in given or None in (of_stage["prefers_longer"]["value"] for of_stage in metrics.values()):
        return []
    axes = _share_axes(given[0])
    for place, (stage, of_stage) in enumerate(metrics.items()):
        _point(axes, place, of_stage["prefers_longer"], stage_color(report, stage))
    _name_places(axes, list(metrics))
    title = "how often the longer of two is preferred"
    return [Panel(svg(axes, title), title, [("dashed: how often it is better", LIGHT["soft"])])]


def costs(report: Report) -> list[Panel]:
    """Time and memory of each stage."""
    panels = []
    for title, key, unit in (("training time", "seconds", "s"), ("peak memory", "peak_memory_gib", "GiB")):
        values = {name: summary[key] for name, summary in report["stages"].items() if summary and summary.get(key)}
        if not values:
            continue
        axes = new_axes(320, 30 * len(values) + 12)
        bars = axes.barh(range(len(values)), list(values.values()), 0.66,
                         color=[stage_color(report, name) for name in values])  # fmt: skip
        said = [f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}" for value in values.values()]
        axes.bar_label(bars, said, padding=6, fontsize=11.5, fontweight="bold")
        axes.set_yticks(range(len(values)), [_clip(name, 15) for name in values])
        axes.set_xticks([])
        axes.grid(False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3 * max(values.values()))  # room for the labels
        panels.append(Panel(svg(axes, f"{title} by stage"), title))
    return panels


def _share_axes(reference: float) -> Axes:
    """Axes for a share from 0 to 1, with a dashed line at `reference`."""
    axes = new_axes(320, 210)
    axes.set_ylim(0, 1)
    axes.axhline(reference, color=LIGHT["soft"], linewidth=1, linestyle="--")
    return axes


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), [_clip(name, 52 // len(names)) for name in names])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(False, axis="x")


def _point(axes: Axes, place: float, metric: dict[str, Any], color: str) -> None:
    """A value as a dot, with its interval as a line behind it."""
    if metric["low"] is not None:
        axes.plot([place, place], [metric["low"], metric["high"]], color=color, linewidth=2.5, alpha=0.55,
                  solid_capstyle="round")  # fmt: skip
    axes.plot(place, metric["value"], "o", color=color, markersize=9, markeredgecolor=LIGHT["card"])


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
