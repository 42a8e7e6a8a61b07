"""`tuna-peft judge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna_peft.cli.options import Column, Format, SkipBad, Split, data_source, from_options, require_jsonl
from tuna_peft.cli.spending import agree_to
from tuna_peft.errors import UserError

if TYPE_CHECKING:
    from tuna_peft.data.config import DataSource, PromptConfig
    from tuna_peft.feedback.judge import JudgeReport
    from tuna_peft.feedback.settings import JudgeSettings


def judge(
    data: Annotated[str, typer.Argument(help="Prompts with several responses, in any format that can be read.")],
    out: Annotated[
        Path | None, typer.Argument(help="A .jsonl file to write; with --validate a .json one.", show_default=False)
    ] = None,
    server: Annotated[
        str | None, typer.Option("--server", help="Base URL of an OpenAI-compatible server.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The judge: its name on the server; without --server, a model to run here."),
    ] = None,
    function: Annotated[
        str | None, typer.Option("--function", help="A program as judge: module:function or builtin:pico.")
    ] = None,
    quantization: Annotated[
        str, typer.Option("--quantization", help="Of a model here: nf4, fp4, int8 or none; a stack keeps its own.")
    ] = "none",
    instructions: Annotated[
        str | None, typer.Option("--instructions", help="What else should count, in words for the judge.")
    ] = None,
    both_orders: Annotated[
        bool, typer.Option("--both-orders", help="Ask in two opposite orders; disagreements become ties.")
    ] = False,
    include_judge_answer: Annotated[
        str, typer.Option("--include-judge-answer", help="The judge's own response: no, best or reference.")
    ] = "no",
    temperature: Annotated[float, typer.Option("--temperature", help="Of the first attempt.")] = 0.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest answer of the judge.")] = 2048,
    attempts: Annotated[int, typer.Option("--attempts", help="Answers to ask for until one can be read.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Of the order in which responses are shown.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Of a model here: questions at once.")] = 8,
    in_flight: Annotated[int, typer.Option("--in-flight", help="Of a server: requests at once.")] = 8,
    timeout: Annotated[float, typer.Option("--timeout", help="Of a server: seconds for an answer.")] = 300.0,
    retries: Annotated[int, typer.Option("--retries", help="Of a server: after 429, 5xx, lost connections.")] = 6,
    api_key_env: Annotated[
        str, typer.Option("--api-key-env", help="The environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
    price_in: Annotated[
        float | None, typer.Option("--price-in", help="Price of a million prompt tokens.", show_default=False)
    ] = None,
    price_out: Annotated[
        float | None, typer.Option("--price-out", help="Price of a million answer tokens.", show_default=False)
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option("--max-cost", help="Stop before it costs more.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending money.")] = False,
    journal: Annotated[
        Path | None, typer.Option("--journal", help="Where answers are kept.", show_default="OUT.journal.jsonl")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Ask once more what could not be read before.")] = False,
    skip_unanswered: Annotated[
        bool, typer.Option("--skip-unanswered", help="Leave out and count prompts that get no answer at all.")
    ] = False,
    validate: Annotated[
        bool, typer.Option("--validate", help="DATA is ranked by people: say how far the judge agrees with them.")
    ] = False,
    format: Format = "auto",
    column: Column = None,
    split: Split = "train",
    template: Annotated[str, typer.Option("--template", help="alpaca, chat, none, or a text.")] = "alpaca",
    skip_bad_rows: SkipBad = False,
) -> None:
    """Rank the responses to each prompt; interrupted, the same command goes on and pays for nothing twice."""
    from tuna_peft.feedback.settings import JudgeSettings

    if server is not None and model is None:
        raise UserError("a server needs the name of its model", where="--server", fix="Give it with --model.")
    own = {"no": False, "best": True}.get(include_judge_answer, include_judge_answer)
    settings = from_options(
        JudgeSettings,
        {
            "server": server and {
                "base_url": server, "model": model, "api_key_env": api_key_env, "timeout": timeout,
                "max_retries": retries, "in_flight": in_flight, "price_in": price_in, "price_out": price_out,
                "max_cost": max_cost,
            },
            "model": None if server else model, "quantization": quantization, "function": function,
            "instructions": instructions, "both_orders": both_orders, "include_judge_answer": own,
            "temperature": temperature, "max_tokens": max_tokens, "attempts": attempts, "seed": seed,
            "batch_size": batch_size, "on_no_answer": "skip" if skip_unanswered else "error",
        },
    )  # fmt: skip
    source, prompt = data_source(data, format, column, split, template, skip_bad_rows)
    if validate:
        _validate(source, prompt, settings, out, journal, again, yes)
    else:
        _judge(source, prompt, settings, out, journal, again, yes)


def _judge(
    source: DataSource,
    prompt: PromptConfig,
    settings: JudgeSettings,
    out: Path | None,
    journal_path: Path | None,
    again: bool,
    yes: bool,
) -> None:
    from tuna_peft.data.load import load_candidates
    from tuna_peft.feedback.judge import Judging
    from tuna_peft.files import write_jsonl
    from tuna_peft.journal import Journal

    if out is None:
        raise UserError("where should the ranked responses go?", where="OUT", fix="Name a .jsonl file to write.")
    require_jsonl(out)
    rows, read = load_candidates(source, prompt)
    with Journal(journal_path or out.with_suffix(".journal.jsonl")) as journal:
        judging = Judging(rows, settings, journal, again=again)
        if settings.function is None:
            agree_to(judging.estimate(), settings.server, yes)
        records, report = judging.records()
    write_jsonl(out, records)
    typer.echo(f"wrote {out}: {report.ranked:,} of {read.read:,} prompts ranked")
    for reason, count in {**read.skipped, **report.left_out}.items():
        typer.echo(f"  left out: {count:,} ({reason})")
    _print_answers(report)


def _validate(
    source: DataSource,
    prompt: PromptConfig,
    settings: JudgeSettings,
    out: Path | None,
    journal_path: Path | None,
    again: bool,
    yes: bool,
) -> None:
    from tuna_peft.feedback.agreement import Validation, read_people
    from tuna_peft.files import write_json
    from tuna_peft.journal import Journal

    if out is not None and out.suffix != ".json":
        raise UserError("a report is written as JSON", where=str(out), fix="End it in .json.")
    people = read_people(source, prompt)
    with Journal(journal_path or Path(out or "validation").with_suffix(".journal.jsonl")) as journal:
        validation = Validation(people, settings, journal, again=again)
        if settings.function is None:
            agree_to(validation.judging.estimate(), settings.server, yes)
        agreement, report = validation.measure(source.path)
    for line in agreement.lines():
        typer.echo(line)
    _print_answers(report)
    if out is not None:
        write_json(out, {"agreement": agreement.as_dict(), "judge": report.as_dict()})
        typer.echo(f"wrote {out}")


def _print_answers(report: JudgeReport) -> None:
    asked = f"answers: {report.asked:,} asked for, {report.found:,} known before"
    if report.tokens_in:
        asked += f"; in all {report.tokens_in:,} tokens in, {report.tokens_out:,} out"
    if report.cost:
        asked += f", cost {report.cost:,.4f}"
    typer.echo(f"  {asked}")
    extra: dict[str, Any] = {
        "pairs whose better response depends on the order of showing": (report.pairs_reversed, report.pairs),
        "prompts in which the judge's own response is best": (
            report.own_best,
            report.own_best + report.own_not_best,
        ),
    }
    for what, (part, whole) in extra.items():
        if whole:
            typer.echo(f"  {what}: {part:,} of {whole:,} ({part / whole:.1%})")
