"""Writes the report of a run into its folder. `run` and the commands `report` and `evaluate` call it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuna_peft.evaluation.report.build import Report, build_report
from tuna_peft.evaluation.report.markdown import render_markdown
from tuna_peft.evaluation.report.page import render_page
from tuna_peft.files import write_json, write_text


def write_report(folder: Path, prompts: Sequence[str] = ()) -> Report:
    """Builds the report of the run in `folder` and writes `report.json`, `report.html` and `report.md` there."""
    report = build_report(folder, prompts)
    write_json(folder / "report.json", report)
    write_text(folder / "report.html", render_page(report))
    write_text(folder / "report.md", render_markdown(report))
    return report
