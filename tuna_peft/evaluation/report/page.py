"""`report.html`: one file, nothing fetched, no scripts; whatever a model or a user wrote is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib import resources
from typing import Any

from tuna_peft.evaluation.report import figures
from tuna_peft.evaluation.report.figures import Panel
from tuna_peft.evaluation.report.table import Cell, after, heading_of, metric_cell, stage_table, tasks_of
from tuna_peft.evaluation.results import MEANINGS, in_percent, number

Report = dict[str, Any]

_V_EXPLAINED = (
    "How likely the model finds a held-out response (v, its mean log-probability per token), above or below the mean "
    "of all responses to the same prompt. Each row holds the responses of one rank, the best on top; the dashed line "
    "joins the medians. Training on rankings leans it: the better a response, the further right."
)
_WHY = {"gained": "gained most", "lost": "lost most", "typical": "in between", "chosen": "chosen"}


def render_page(report: Report) -> str:
    """The whole page."""
    style = (resources.files("tuna_peft.evaluation.report") / "style.css").read_text(encoding="utf-8")
    several = len(report["evaluation"]) > 1
    sections = [
        ("stages", "Stage by stage" if several else "Results", _stages(report)),
        ("ranks", "What the model finds likely, by rank", _ranks(report)),
        ("training", "Training", _training(report)),
        ("length", "Accuracy by length", _length(report)),
        ("responses", "The same prompts after each stage" if several else "Responses", _samples(report)),
        ("cost", "Time and memory", _figures(figures.costs(report))),
        ("metrics", "All metrics", _metrics(report)),
        ("run", "The run", _run(report)),
    ]
    kept = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in kept)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{content}</section>' for name, title, content in kept)
    version = escape(str(report["environment"]["packages"].get("tuna_peft", "")))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Responses are not trusted: should anything of them escape escaping, it may load and run nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(report['name'])} · report</title><style>{style}</style></head><body><main>"
        f"<header><h1>{escape(report['name'])}</h1>{_lead(report)}{_cards(report)}<nav>{links}</nav></header>"
        f"{body}<footer>tuna_peft {version}. The same numbers are in report.json.</footer></main></body></html>\n"
    )


def _lead(report: Report) -> str:
    base = report["base"]
    method = base["quantization"]["method"]
    done = report.get("adapters", [name for name, summary in report["stages"].items() if summary])
    text = f"{_count(len(done), 'adapter')} on {base['model']}" if done else str(base["model"])
    text += ", not quantised" if method == "none" else f", quantised to {method.upper()}"
    text += "." if report["seed"] is None else f"; seed {report['seed']}."
    if missing := [name for name, summary in report["stages"].items() if not summary]:
        text += f" Not finished: {', '.join(missing)}."
    return f'<p class="lead">{escape(text)}</p>'


def _cards(report: Report) -> str:
    """What the run changed, in one number a task."""
    cards = []
    for task in tasks_of(report):
        measured = [
            (stage, results[task]["metrics"][results[task]["main"]])
            for stage, results in report["evaluation"].items()
            if task in results and results[task]["metrics"][results[task]["main"]]["value"] is not None
        ]
        if not measured:
            continue
        (first, before), (last, latest) = measured[0], measured[-1]
        cell = metric_cell(latest)
        more = after(last)
        if cell.interval:
            more += f"; 95 % interval {cell.interval}"
        result = report["evaluation"][last][task]
        more += f"; {_count(result['prompts'], 'prompt')}"
        more += ", others are left out (see all metrics)" if result["excluded"] else ""
        meaning = f": {said}" if (said := MEANINGS.get(task.partition("-")[0])) else ""
        from_ = number(before["value"], among=(latest["high"],), percent=latest.get("percent", False))
        start = f"<small>{from_} → </small>" if first != last else ""
        cards.append(
            f'<div class="card"><div class="name"><b>{escape(heading_of(report, task))}</b>{escape(meaning)}</div>'
            f'<div class="big">{start}{cell.text}</div><div class="more">{escape(more)}</div></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _stages(report: Report) -> str:
    headings, rows = stage_table(report)
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr><th>{escape(stage)}</th>"
        + "".join(
            f'<td data-heading="{escape(heading, quote=True)}">{_cell(cell)}</td>'
            for heading, cell in zip(headings, cells, strict=True)
        )
        + "</tr>"
        for stage, cells in rows
    )
    table = _table("after", head, body)
    note = (
        "Below each value its 95 % interval (bootstrap over prompts) and the change against the stage before on the "
        "same prompts: green or red where the interval of that change does not hold zero."
    )
    panels = figures.progress(report)
    return f'{table}<p class="note">{note}</p>{_figures(panels, "fixed" * (len(panels) > 2))}' if panels else table


def _table(first: str, head: str, body: str) -> str:
    rows = f"<thead><tr><th>{first}</th>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="stages">{rows}</table></div>'


def _cell(cell: Cell) -> str:
    if not cell.text:
        return ""
    interval_ = f'<span class="interval">{escape(cell.interval)}</span>' if cell.interval else ""
    change = f'<span class="change {cell.verdict}">{escape(cell.change)}</span>' if cell.change else ""
    return f"<span>{escape(cell.text)}{interval_}{change}</span>"


def _ranks(report: Report) -> str:
    panels = figures.v_by_rank(report)
    drawn = _figures(panels, "fixed" * (len(panels) < 3))
    return f'<p class="note">{_V_EXPLAINED}</p>{drawn}' if drawn else ""


def _training(report: Report) -> str:
    return "".join(
        f"<h3>{escape(stage)}</h3>{drawn}"
        for stage in report["curves"]
        if (drawn := _figures(figures.curves(report, stage), "fixed"))
    )


def _length(report: Report) -> str:
    drawn = _figures(figures.by_length(report))
    return (
        '<p class="note">A model that merely likes long answers is right where the better one is longer (right) and '
        f"wrong where it is shorter (left).</p>{drawn}"
        if drawn
        else ""
    )


def _samples(report: Report) -> str:
    def score(value: float | None, task: str) -> str:
        return f"<span>{number(value, percent=in_percent(task))}</span>" if value is not None else ""

    blocks, several = [], len(report["evaluation"]) > 1
    for sample in report["samples"]:
        tag = f'<span class="tag">{escape(_WHY[sample["why"]])}</span>' if several else ""
        answers = "".join(
            f'<div class="answer"><b><span>{escape(stage)}</span>{score(said["score"], sample["task"])}</b>'
            f"{_text(said['text'])}</div>"
            for stage, said in sample["responses"].items()
        )
        references = "\n".join(sample["references"])
        if references:
            answers += f'<div class="answer reference"><b><span>reference</span></b>{_text(references)}</div>'
        blocks.append(
            f'<div class="sample"><div class="prompt">{tag}{_text(sample["prompt"])}</div>'
            f'<div class="answers">{answers}</div></div>'
        )
    if not blocks:
        return ""
    samples = f'<div class="samples">{"".join(blocks)}</div>'
    if not several:
        return samples
    scored = heading_of(report, report["samples"][0]["task"])
    note = f"With the {scored}: where it changed most from first to last, for better and for worse, and in between."
    return f'<p class="note">{escape(note)}</p>{samples}'


def _metrics(report: Report) -> str:
    return "".join(_metrics_of(report, task) for task in tasks_of(report))


def _metrics_of(report: Report, task: str) -> str:
    stages = [stage for stage, results in report["evaluation"].items() if task in results]
    results = [report["evaluation"][stage][task] for stage in stages]
    groups = {"": results[-1]["metrics"], **results[-1]["groups"]}
    rows = []
    for group, metrics in groups.items():
        for name in metrics:
            cells = []
            for result in results:
                metric = ({"": result["metrics"], **result["groups"]}.get(group) or {}).get(name)
                cells.append(metric_cell(metric) if metric else Cell("–"))
            label = f"{group}: {name}" if group else name
            rows.append((label.replace("_", " "), cells))
    head = "".join(f"<th>{escape(stage)}</th>" for stage in stages)
    body = "".join(
        f"<tr><th>{escape(label)}</th>"
        + "".join(
            f'<td data-heading="{escape(stage, quote=True)}">{_cell(cell)}</td>'
            for stage, cell in zip(stages, cells, strict=True)
        )
        + "</tr>"
        for label, cells in rows
    )
    excluded = "".join(
        f"<li>{escape(stage)}: {escape(left['reason'])}: {left['count']} ({escape(', '.join(left['names'][:5]))})</li>"
        for stage, result in zip(stages, results, strict=True)
        for left in result["excluded"]
    )
    left_out = f'<p class="note">Left out of the scores:</p><ul class="note">{excluded}</ul>' if excluded else ""
    count = _count(results[-1]["prompts"], "prompt")
    table = _table("", head, body)
    return f"<details><summary>{escape(task)}, {count}</summary>{table}{left_out}</details>"


def _run(report: Report) -> str:
    environment, base = report["environment"], report["base"]
    rows = [("base", base["model"]), ("revision", base.get("revision")), ("fingerprint", base.get("fingerprint"))]
    rows += [("GPU", environment.get("gpu")), ("platform", environment.get("platform"))]
    rows += [("Python", environment.get("python")), ("threads", environment.get("threads"))]
    rows += [("packages", ", ".join(f"{name} {version}" for name, version in environment["packages"].items()))]
    for name, counts in report["data"].items():
        rows.append((f"data of {name}", _flat(counts)))
    for name, summary in report["stages"].items():
        if summary:
            shown = ("type", "steps", "epochs", "train_loss", "trainable_parameters", "lora", "resumed_from")
            rows.append((f"stage {name}", _flat({key: summary.get(key) for key in shown})))
    for name, export in report["exports"].items():
        divergence = export.get("divergence") if isinstance(export, dict) else None
        rows.append((f"export {name}", _flat(divergence or {}) or "written"))
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in rows if value)
    recipe = (
        f"<details><summary>recipe.yaml</summary><pre>{escape(report['recipe'])}</pre></details>"
        if report["recipe"]
        else ""
    )
    return f'<table class="list"><tbody>{body}</tbody></table>{recipe}'


def _figures(panels: Iterable[Panel], kind: str = "") -> str:
    blocks = []
    for panel in panels:
        caption = f"<figcaption>{escape(panel.title)}</figcaption>" if panel.title else ""
        legend = "".join(
            f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in panel.legend
        )
        legend = f'<ul class="legend">{legend}</ul>' if legend else ""
        blocks.append(f'<figure data-points="{panel.chart.points}">{caption}{panel.chart}{legend}</figure>')
    return f'<div class="figures {kind}">{"".join(blocks)}</div>' if blocks else ""


def _text(text: str) -> str:
    return escape(text) if text.strip() else "<em>(nothing)</em>"


def _count(number_of: int, noun: str) -> str:
    return f"{number_of:,} {noun}" if number_of == 1 else f"{number_of:,} {noun}s"


def _flat(values: dict[str, Any]) -> str:
    """Nested counts as `read 5; tokens: kept 4`; what is nothing, or nought, is left out."""
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
