"""`tuna-peft judge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna_peft.cli.data_options import DataOptions, reads_data
from tuna_peft.cli.options import (
    Device,
    Yes,
    from_options,
    require_jsonl,
)
from tuna_peft.cli.settings_options import SettingsCommand
from tuna_peft.cli.spending import confirm_spending
from tuna_peft.errors import UserError
from tuna_peft.terminal import echo

if TYPE_CHECKING:
    from tuna_peft.data.config import DataSource, PromptConfig
    from tuna_peft.feedback.judge import JudgeReport
    from tuna_peft.feedback.settings import JudgeSettings


class JudgeCommand(SettingsCommand):
    """Options of `JudgeSettings`."""

    settings, panel = "JudgeSettings", "Judge"


@reads_data()
def judge(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="Prompts with several responses, in any format that can be read; or a recipe or run, or RECIPE@STAGE."
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(help="The .jsonl file to write; with --validate a .json file.", show_default=False)
    ] = None,
    device: Device = "auto",
    yes: Yes = False,
    journal: Annotated[
        Path | None, typer.Option("--journal", help="File that caches the answers.", show_default="OUT.journal.jsonl")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Ask again where an earlier answer could not be read.")
    ] = False,
    validate: Annotated[
        bool, typer.Option("--validate", help="DATA is ranked by people: measure how far the judge agrees with them.")
    ] = False,
    *,
    reading: DataOptions,
) -> None:
    """Rank the responses to each prompt. If interrupted, run the same command again to resume."""
    from tuna_peft.feedback.settings import JudgeSettings

    settings = from_options(JudgeSettings, context.obj)
    source, prompt = reading.source(data)
    options = {"again": again, "device": device}
    if validate:
        _validate(source, prompt, settings, out, journal, yes, options)
    else:
        _judge(source, prompt, settings, out, journal, yes, options)


def _judge(
    source: DataSource,
    prompt: PromptConfig,
    settings: JudgeSettings,
    out: Path | None,
    journal_path: Path | None,
    yes: bool,
    options: dict[str, Any],
) -> None:
    from tuna_peft.data.load import load_candidates
    from tuna_peft.feedback.judge import Judging
    from tuna_peft.files import write_jsonl
    from tuna_peft.journal import Journal
    from tuna_peft.planning.command_sizes import sized_judging

    if out is None:
        raise UserError("the output file is missing", where="OUT", fix="Name a .jsonl file to write.")
    require_jsonl(out)
    rows, read = load_candidates(source, prompt)
    with Journal(journal_path or out.with_suffix(".journal.jsonl")) as journal:
        settings = sized_judging(settings, rows, journal, options["device"])
        judging = Judging(rows, settings, journal, **options)
        if settings.function is None:
            confirm_spending(judging.estimate(), settings.server, yes)
        records, report = judging.records()
    write_jsonl(out, records)
    echo(f"wrote {out}: {report.ranked:,} of {read.read:,} prompts ranked")
    for reason, count in {**read.skipped, **report.left_out}.items():
        echo(f"  skipped: {count:,} ({reason})")
    _print_answers(report)


def _validate(
    source: DataSource,
    prompt: PromptConfig,
    settings: JudgeSettings,
    out: Path | None,
    journal_path: Path | None,
    yes: bool,
    options: dict[str, Any],
) -> None:
    from dataclasses import asdict

    from tuna_peft.feedback.agreement import measure_agreement, read_annotated_rows, validation
    from tuna_peft.files import write_json
    from tuna_peft.journal import Journal
    from tuna_peft.planning.command_sizes import sized_judging

    if out is not None and out.suffix != ".json":
        raise UserError("a report is written as JSON", where=str(out), fix="Let its name end in .json.")
    rows = read_annotated_rows(source, prompt)
    with Journal(journal_path or Path(out or "validation").with_suffix(".journal.jsonl")) as journal:
        settings = sized_judging(settings, [one.row for one in rows], journal, options["device"])
        judging = validation(rows, settings, journal, **options)
        if settings.function is None:
            confirm_spending(judging.estimate(), settings.server, yes)
        agreement, report = measure_agreement(rows, judging, source.title)
    for line in agreement.lines():
        echo(line)
    _print_answers(report)
    if out is not None:
        write_json(out, {"agreement": asdict(agreement), "judge": report.as_dict()})
        echo(f"wrote {out}")


def _print_answers(report: JudgeReport) -> None:
    asked = f"answers: {report.asked:,} new, {report.found:,} from the journal"
    if report.tokens_in:
        asked += f"; in total {report.tokens_in:,} tokens in, {report.tokens_out:,} out"
    if report.cost:
        asked += f", cost {report.cost:,.4f}"
    echo(f"  {asked}")
    extra: dict[str, Any] = {
        "pairs whose better response depends on the order shown": (report.pairs_reversed, report.pairs),
        "prompts in which the judge ranks its own response first": (
            report.own_best,
            report.own_best + report.own_not_best,
        ),
    }
    for what, (part, whole) in extra.items():
        if whole:
            echo(f"  {what}: {part:,} of {whole:,} ({part / whole:.1%})")
