"""`report.html`: what `page.html.jinja` and the figures need, taken from the report. `write` calls it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tuna_peft.evaluation.report import figures
from tuna_peft.evaluation.report.checks import checks
from tuna_peft.evaluation.report.table import Cell, after, heading_of, main_metrics, metric_cell, stage_table, tasks_of
from tuna_peft.evaluation.report.theme import PALETTE, css, style
from tuna_peft.evaluation.results import MEANINGS, in_percent, number
from tuna_peft.markup import plural, render

Report = dict[str, Any]

_REASONS = {"gained": "gained most", "lost": "lost most", "typical": "in between", "chosen": "chosen"}


def render_page(report: Report) -> str:
    """The whole page: one file without scripts, which loads nothing from elsewhere."""
    with style():
        drawings = {
            "progress": figures.progress(report),
            "v_by_rank": figures.v_by_rank(report),
            "curves": {stage: figures.curves(report, stage) for stage in report["curves"]},
            "by_length": figures.by_length(report),
            "costs": figures.costs(report),
        }
    return render(
        "evaluation/report/page.html.jinja",
        report=report,
        several=len(report["evaluation"]) > 1,
        lead=_lead(report),
        cards=list(_cards(report)),
        stage_table=stage_table(report),
        task_tables=[_task_table(report, task) for task in tasks_of(report)],
        checks=checks(report),
        facts=list(_facts(report)),
        palette=PALETTE,
        reasons=_REASONS,
        css=css,
        heading_of=heading_of,
        in_percent=in_percent,
        number=number,
        **drawings,
    )


def _lead(report: Report) -> str:
    base = report["base"]
    method = base["quantization"]["method"]
    done = report.get("adapters", [name for name, summary in report["stages"].items() if summary])
    text = f"{plural(len(done), 'adapter')} on {base['model']}" if done else str(base["model"])
    text += ", not quantized" if method == "none" else f", quantized to {method.upper()}"
    text += "." if report["seed"] is None else f"; seed {report['seed']}."
    if missing := [name for name, summary in report["stages"].items() if not summary]:
        text += f" Not finished: {', '.join(missing)}."
    if held_out := report["data"].get("evaluation", {}).get("held_out"):
        text += f" Measured on {plural(sum(held_out.values()), 'prompt')} held back from training."
    return text


def _cards(report: Report) -> Iterator[dict[str, str]]:
    """The main metric of each task: its name and meaning, and its value after the first and the last stage."""
    for task, measured in main_metrics(report).items():
        (first, before), *_, (last, latest) = [*measured.items()] * 2
        cell, result = metric_cell(latest), report["evaluation"][last][task]
        start = number(before["value"], among=(latest["high"],), percent=latest.get("percent", False))
        more = after(last) + (f"; 95 % interval {cell.interval}" if cell.interval else "")
        more += f"; {plural(result['prompts'], 'prompt')}"
        yield {
            "name": heading_of(report, task),
            "meaning": MEANINGS.get(task.partition("-")[0], ""),
            "start": start if first != last else "",
            "value": cell.text,
            "more": more + (", others are excluded (see all metrics)" if result["excluded"] else ""),
        }


def _task_table(report: Report, task: str) -> dict[str, Any]:
    """Every metric of a task, of all prompts and of groups, after each stage that it measured."""
    results = {stage: tasks[task] for stage, tasks in report["evaluation"].items() if task in tasks}
    parts = {stage: {"": result["metrics"], **result["groups"]} for stage, result in results.items()}
    last = list(results)[-1]
    rows = []
    for group, metrics in parts[last].items():
        for name in metrics:
            found = [(of_stage.get(group) or {}).get(name) for of_stage in parts.values()]
            label = f"{group}: {name}" if group else name
            rows.append((label.replace("_", " "), [metric_cell(metric) if metric else Cell("–") for metric in found]))
    return {
        "name": task,
        "prompts": results[last]["prompts"],
        "stages": list(results),
        "rows": rows,
        "excluded": [(stage, excluded) for stage, result in results.items() for excluded in result["excluded"]],
    }


def _facts(report: Report) -> Iterator[tuple[str, Any]]:
    """Names and values for the last table; the page leaves out those without a value."""
    environment, base = report["environment"], report["base"]
    yield from [("base", base["model"]), ("revision", base.get("revision")), ("fingerprint", base.get("fingerprint"))]
    yield from [("GPU", environment.get("gpu")), ("platform", environment.get("platform"))]
    yield from [("Python", environment.get("python")), ("threads", environment.get("threads"))]
    yield "packages", ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    for name, counts in report["data"].items():
        yield f"data of {name}", _flat(counts)
    for name, summary in report["stages"].items():
        shown = ("type", "steps", "epochs", "train_loss", "trainable_parameters", "lora", "resumed_from")
        yield f"stage {name}", _flat({key: (summary or {}).get(key) for key in shown})
    for name, export in report["exports"].items():
        divergence = export.get("divergence") if isinstance(export, dict) else None
        yield f"export {name}", _flat(divergence or {}) or "written"


def _flat(values: dict[str, Any]) -> str:
    """Nested counts as `read 5; tokens: kept 4`, without those that are zero or missing."""
    plain, nested = [], []
    for key, value in values.items():
        name = str(key).replace("_", " ")
        if isinstance(value, dict):
            nested += [f"{name}: {inside}"] if (inside := _flat(value)) else []
        elif isinstance(value, float):
            plain.append(f"{name} {value:.4g}")
        elif value:
            plain.append(f"{name} {value:,}" if type(value) is int else f"{name} {value}")
    return "; ".join([*([", ".join(plain)] if plain else []), *nested])
