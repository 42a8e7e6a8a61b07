"""`tuna-peft score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    from tuna_peft.data.ranked import Record
    from tuna_peft.feedback.scored import ScoreReport

RECORDED = "With --logprobs"


class ScoreCommand(SettingsCommand):
    """Options of `ScoreSettings`."""

    settings, panel = "ScoreSettings", "Teacher"


@reads_data()
def score(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="Prompts with responses, in any format that can be read, or a recipe or run, or RECIPE@STAGE; with "
            "--generate: prompts."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The .jsonl file of ranked responses to write.")],
    device: Device = "auto",
    yes: Yes = False,
    logprobs: Annotated[
        str | None,
        typer.Option(
            "--logprobs",
            help="Path of recorded log-probabilities in each record, sums or lists: responses[].logprob_sum",
            rich_help_panel=RECORDED,
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            help="Path of the numbers of tokens: responses[].tokens; without it --tokenizer counts them.",
            rich_help_panel=RECORDED,
        ),
    ] = None,
    teacher: Annotated[
        str, typer.Option("--teacher", help="Name of the teacher in the output.", rich_help_panel=RECORDED)
    ] = "recorded",
    *,
    reading: DataOptions,
) -> None:
    """Rank responses by a teacher's length-normalized log-probabilities. Run the same command again to resume."""
    from tuna_peft.data.load import load_candidates, load_prompts
    from tuna_peft.feedback.settings import ScoreSettings
    from tuna_peft.journal import Journal

    given = context.obj
    teachers = [f"--{name}" for name in ("model", "server") if name in given]
    teachers += ["--logprobs"] if logprobs is not None else []
    if len(teachers) != 1:
        raise UserError(
            f"give one teacher: --model, --server or --logprobs, not {' and '.join(teachers) or 'none'}",
            fix="See `tuna-peft score --help`.",
        )
    if logprobs is not None and (idle := given.keys() - {"tokenizer", "length_penalty"}):
        raise UserError(f"options without effect with --logprobs: {', '.join(sorted(idle))}")
    require_jsonl(out)
    source, prompt = reading.source(data)
    if logprobs is not None:
        from tuna_peft.cli.data import load_tokenizer
        from tuna_peft.feedback.recorded import score_recorded

        if source.columns is None or not isinstance(source.columns.completions, str):
            raise UserError(
                "--logprobs needs to know where the responses are",
                where=data,
                fix="For example: --column instruction=instruction --column completions=responses[].text",
            )
        rows, _ = load_candidates(source, prompt)
        tokenizer = load_tokenizer(given.pop("tokenizer", None))
        records, report = score_recorded(
            rows, completions=source.columns.completions, logprobs=logprobs, lengths=lengths, tokenizer=tokenizer,
            teacher=teacher, skip_bad_rows=source.on_bad_row == "skip", **given,
        )  # fmt: skip
        return _write(out, records, report)
    settings = from_options(ScoreSettings, given)
    rows, _ = (load_prompts if settings.generate else load_candidates)(source, prompt)
    with Journal(out.with_suffix(".journal.jsonl")) as journal:
        if settings.server is not None:
            from tuna_peft.feedback.teacher_server import score_with_server

            records, report = score_with_server(
                rows, settings, journal, agree=lambda estimate: confirm_spending(estimate, settings.server, yes)
            )
        else:
            from tuna_peft.feedback.teacher import score_with_model
            from tuna_peft.planning.command_sizes import sized_scoring

            settings = sized_scoring(settings, rows, journal, device)
            records, report = score_with_model(rows, settings, journal, device=device)
    _write(out, records, report)


def _write(out: Path, records: list[Record], report: ScoreReport) -> None:
    from tuna_peft.files import write_jsonl

    write_jsonl(out, records)
    echo(f"wrote {out}: {report.responses:,} responses to {report.scored:,} of {report.rows:,} prompts, ranked")
    for line in report.lines():
        echo(f"  {line}")
