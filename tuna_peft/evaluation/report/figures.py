"""The report's figures: each takes a part of the report and gives drawings with a caption."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuna_peft.evaluation.report.svg import Chart, Point, padded, ticks
from tuna_peft.evaluation.report.table import after, heading_of, metric_cell, tasks_of
from tuna_peft.evaluation.results import number

Report = dict[str, Any]

_SERIES = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")


@dataclass
class Panel:
    """One drawing with its heading and the colours of its series."""

    chart: Chart
    title: str = ""
    legend: Sequence[tuple[str, str]] = ()


def stage_colour(report: Report, stage: str) -> str:
    """The base is grey; the stages go from light to strong."""
    names = list(report["evaluation"])
    place, last = names.index(stage), max(len(names) - 1, 1)
    return f"color-mix(in oklab, var(--accent) {round(100 * place / last)}%, var(--quiet))"


def rank_colour(rank: int, ranks: int) -> str:
    """From the best to the worst."""
    return f"color-mix(in oklab, var(--worst) {round(100 * rank / max(ranks - 1, 1))}%, var(--best))"


def progress(report: Report) -> list[Panel]:
    """The main metric of each task over the stages, with its interval."""
    stages = list(report["evaluation"])
    panels: list[Panel] = []
    for task in tasks_of(report) if len(stages) > 1 else ():
        measured = [
            (stage, results[task]["metrics"][results[task]["main"]])
            for stage, results in report["evaluation"].items()
            if task in results and results[task]["metrics"][results[task]["main"]]["value"] is not None
        ]
        if not measured:
            continue
        chart = Chart(f"{heading_of(report, task)} after each stage", height=190, left=38, right=34, bottom=24)
        ends = [metric[key] for _, metric in measured for key in ("low", "value", "high") if metric[key] is not None]
        low, high = padded(ends, 0.12)
        x, y = chart.x(-0.4, len(stages) - 0.6), chart.y(low, high)
        chart.y_axis(y, ticks(low, high, 4))
        at = [(x(stages.index(stage)), y(metric["value"])) for stage, metric in measured]
        chart.path(at, "trend")
        for (stage, metric), point in zip(measured, at, strict=True):
            cell = metric_cell(metric)
            said = f"{stage}: {cell.text} ({cell.interval})" if cell.interval else f"{stage}: {cell.text}"
            _measured(chart, point, y, metric, stage_colour(report, stage), said)
            chart.text((point[0] + 9, point[1] - 7), cell.text, kind="value")
        for place, stage in enumerate(stages):
            chart.text((x(place), chart.height - 8), _clip(stage, 52 // len(stages)), "middle", "axis")
        panels.append(Panel(chart, heading_of(report, task)))
    return panels


def v_by_rank(report: Report) -> list[Panel]:
    """For each stage, the density of v above the prompt's mean at each rank, best on top; the medians joined."""
    panels = []
    for stage, ranks in report["v_by_rank"].items():
        top = max(d for of_stage in report["v_by_rank"].values() for rank in of_stage for _, d in rank["density"])
        grid = [lead for lead, _ in ranks[0]["density"]]
        row = 44.0
        chart = Chart(
            f"distribution of v by rank: {stage}", width=250, height=row * len(ranks) + 62, left=42, right=6, top=26,
            bottom=36,
        )  # fmt: skip
        x = chart.x(grid[0], grid[-1])
        chart.x_axis(x, ticks(grid[0], grid[-1], 5), "v − mean of the prompt, nats")
        medians = []
        for place, rank in enumerate(ranks):
            floor = chart.top + row * (place + 1)
            colour = rank_colour(place, len(ranks))
            curve = [(x(lead), floor - 1.55 * row * density / top) for lead, density in rank["density"]]
            chart.path([(x(grid[0]), floor), *curve, (x(grid[-1]), floor)], "ridge", f"fill:{colour};stroke:{colour}",
                       closed=True)  # fmt: skip
            chart.text((chart.left - 6, floor - 3), f"rank {rank['rank'] + 1}", "end")
            median = min(max(rank["quantiles"]["0.5"], grid[0]), grid[-1])
            medians.append(((x(median), floor - 4), rank["quantiles"]["0.5"], rank["count"], colour))
        chart.path([at for at, *_ in medians], "spine")
        for at, median, count, colour in medians:
            chart.dot(at, "median", f"fill:{colour}", radius=4.5, title=f"median {median:.3f} of {count}")
        panels.append(Panel(chart, after(stage)))
    return panels


def curves(report: Report, stage: str) -> list[Panel]:
    """What the trainer logged over the steps of a stage."""
    panels = []
    for panel, series in report["curves"].get(stage, {}).items():
        ranked = panel == "v by rank"
        colours = {
            name: rank_colour(place, len(series)) if ranked else _SERIES[place % len(_SERIES)]
            for place, name in enumerate(series)
        }
        chart = Chart(f"{stage}: {panel} over the steps", height=170, left=46)
        points = [point for of_series in series.values() for point in of_series if math.isfinite(point[1])]
        x = chart.x(min(p[0] for p in points), max(p[0] for p in points))
        low, high = padded([value for _, value in points])
        y = chart.y(low, high)
        chart.y_axis(y, ticks(low, high, 4))
        chart.x_axis(x, ticks(points[0][0], max(p[0] for p in points), 5), "step")
        for name, of_series in series.items():
            finite = [(x(step), y(value)) for step, value in of_series if math.isfinite(value)]
            chart.path(finite, "curve", f"stroke:{colours[name]}")
        legend = [(_series_name(name), colour) for name, colour in colours.items()] if len(series) > 1 else []
        panels.append(Panel(chart, panel, legend))
    return panels


def by_length(report: Report) -> list[Panel]:
    """Pair accuracy by how much longer the better response is; and how often the longer one is preferred."""
    stages = report["by_length"]
    groups = list(dict.fromkeys(entry["group"] for entries in stages.values() for entry in entries))
    if not groups:
        return []
    chart = Chart("pair accuracy by ratio of lengths", height=210, left=34, right=6, bottom=38)
    x, y = chart.x(-0.5, len(groups) - 0.5), chart.y(0, 1)
    chart.y_axis(y, ticks(0, 1, 5))
    chart.line((chart.left, y(0.5)), (chart.width - chart.right, y(0.5)), "chance")
    for place, group in enumerate(groups):
        chart.text((x(place), chart.height - 24), group.replace(" to inf", "+").replace(" to ", "–"), "middle")
    chart.text((chart.width / 2, chart.height - 7), "tokens of the better / of the worse response", "middle", "axis")
    width = min(0.6, 0.16 * len(stages))
    for place, (stage, entries) in enumerate(stages.items()):
        offset = width * (place / max(len(stages) - 1, 1) - 0.5)
        for entry in entries:
            at = x(groups.index(entry["group"]) + offset), y(entry["value"])
            said = f"{stage}: {number(entry['value'])} of {entry['count']} pairs"
            _measured(chart, at, y, entry, stage_colour(report, stage), said)
    legend = [*((stage, stage_colour(report, stage)) for stage in stages), ("dashed: by chance", "var(--soft)")]
    return [Panel(chart, "pairs in the right order", legend), *_preference_for_length(report)]


def _preference_for_length(report: Report) -> list[Panel]:
    metrics = {
        stage: results["ranking"]["metrics"]
        for stage, results in report["evaluation"].items()
        if "prefers_longer" in results.get("ranking", {}).get("metrics", {})
    }
    given = [of_stage["better_is_longer"]["value"] for of_stage in metrics.values()]
    if not given or None in given or None in (of_stage["prefers_longer"]["value"] for of_stage in metrics.values()):
        return []
    chart = Chart("how often the longer response is preferred", height=210, left=34, right=6, bottom=38)
    x, y = chart.x(-0.5, len(metrics) - 0.5), chart.y(0, 1)
    chart.y_axis(y, ticks(0, 1, 5))
    chart.line((chart.left, y(given[0])), (chart.width - chart.right, y(given[0])), "chance")
    for place, (stage, of_stage) in enumerate(metrics.items()):
        metric = of_stage["prefers_longer"]
        said = f"{stage}: {number(metric['value'])} of {metric['count']} pairs"
        _measured(chart, (x(place), y(metric["value"])), y, metric, stage_colour(report, stage), said)
        chart.text((x(place), chart.height - 24), _clip(stage, 52 // len(metrics)), "middle", "axis")
    return [
        Panel(chart, "how often the longer of two is preferred", [("dashed: how often it is better", "var(--soft)")])
    ]


def costs(report: Report) -> list[Panel]:
    """Time and memory of each stage."""
    panels = []
    for title, key, unit in (("training time", "seconds", "s"), ("peak memory", "peak_memory_gib", "GiB")):
        values = {name: summary[key] for name, summary in report["stages"].items() if summary and summary.get(key)}
        if not values:
            continue
        chart = Chart(f"{title} by stage", height=30 * len(values) + 12, left=100, right=70, top=4, bottom=4)
        x = chart.x(0, max(values.values()))
        for place, (name, value) in enumerate(values.items()):
            top = chart.top + 30 * place + 5
            chart.text((chart.left - 8, top + 14), _clip(name, 15), "end", "axis")
            chart.bar((x(0), top), (x(value), top + 20), "bar", f"fill:{stage_colour(report, name)}")
            chart.text((x(value) + 6, top + 14), f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}",
                       kind="value")  # fmt: skip
        panels.append(Panel(chart, title))
    return panels


def _measured(
    chart: Chart, at: Point, y: Callable[[float], float], metric: dict[str, Any], colour: str, said: str
) -> None:
    """A value as a dot, its interval as a line behind it."""
    if metric["low"] is not None:
        chart.line((at[0], y(metric["low"])), (at[0], y(metric["high"])), "whisker", f"stroke:{colour}")
    chart.dot(at, "point", f"fill:{colour}", radius=4.5, title=said)


def _series_name(name: str) -> str:
    rank = name.removeprefix("scores/rank_")
    return f"rank {int(rank) + 1}" if rank.isdigit() else name.replace("_", " ")


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
