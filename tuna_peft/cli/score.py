"""`tuna-peft score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna_peft.cli.options import Column, Format, SkipBad, Split, Template, data_source, from_options, require_jsonl
from tuna_peft.cli.spending import agree_to
from tuna_peft.errors import UserError

if TYPE_CHECKING:
    from tuna_peft.data.ranked import Record
    from tuna_peft.feedback.scored import ScoreReport


def score(
    data: Annotated[str, typer.Argument(help="Responses, in any format that can be read; with --generate: prompts.")],
    out: Annotated[Path, typer.Argument(help="A .jsonl file of the ranked type to write.")],
    model: Annotated[
        str | None, typer.Option("--model", help="A teacher that runs here: path, Hub id, stack, run, builtin:.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of --model on the Hub.")] = None,
    quantization: Annotated[
        str, typer.Option("--quantization", help="Of --model: none, nf4, fp4 or int8; a stack keeps its own.")
    ] = "none",
    device: Annotated[str, typer.Option("--device", help="Of --model: auto, cpu, cuda, cuda:1 ...")] = "auto",
    max_tokens_per_batch: Annotated[
        int, typer.Option("--max-tokens-per-batch", min=1, help="Of --model: most tokens of a forward pass.")
    ] = 4096,
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="A completions server with log-probabilities, as teacher.")
    ] = None,
    server_model: Annotated[
        str | None, typer.Option("--server-model", help="With --base-url: the model's name there.")
    ] = None,
    api_key_env: Annotated[
        str, typer.Option("--api-key-env", help="The environment variable that holds its key.")
    ] = "OPENAI_API_KEY",
    in_flight: Annotated[int, typer.Option("--in-flight", min=1, help="Requests at the same time.")] = 8,
    price_in: Annotated[float | None, typer.Option("--price-in", help="Of a million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option("--price-out", help="Of a million answer tokens.")] = None,
    max_cost: Annotated[float | None, typer.Option("--max-cost", help="Stop before the answers cost more.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending money.")] = False,
    generate: Annotated[
        bool, typer.Option("--generate", help="The server draws the responses itself and scores them.")
    ] = False,
    n: Annotated[int, typer.Option("--n", min=2, help="With --generate: responses per prompt.")] = 4,
    temperature: Annotated[float, typer.Option("--temperature", help="With --generate.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="With --generate.")] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="With --generate: longest response.")] = 512,
    logprobs: Annotated[
        str | None,
        typer.Option("--logprobs", help="Recorded log-probabilities, sums or lists: responses[].logprob_sum"),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="With --logprobs: numbers of tokens: responses[].tokens")
    ] = None,
    teacher: Annotated[str, typer.Option("--teacher", help="With --logprobs: the teacher's name.")] = "recorded",
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="The teacher's: counts recorded responses, or sends token ids to a server."),
    ] = None,
    length_penalty: Annotated[
        float, typer.Option("--length-penalty", min=0, help="score = sum / length ** this.")
    ] = 1.0,
    skip_unanswered: Annotated[
        bool, typer.Option("--skip-unanswered", help="Leave out and count what a server does not answer.")
    ] = False,
    format: Format = "auto",
    column: Column = None,
    split: Split = "train",
    template: Template = "alpaca",
    skip_bad_rows: SkipBad = False,
) -> None:
    """Rank responses by a teacher's length-normalised log-probabilities; interrupted, the same command goes on."""
    from tuna_peft.data.load import load_candidates, load_prompts
    from tuna_peft.feedback.settings import ScoreSettings
    from tuna_peft.journal import Journal

    given = {"--model": model, "--base-url": base_url, "--logprobs": logprobs}
    if len(chosen := [name for name, value in given.items() if value is not None]) != 1:
        raise UserError(
            f"give one teacher: --model, --base-url or --logprobs, not {' and '.join(chosen) or 'none'}",
            fix="See `tuna-peft score --help`.",
        )
    require_jsonl(out)
    source, prompt = data_source(data, format, column, split, template, skip_bad_rows)
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
        records, report = score_recorded(
            rows, completions=source.columns.completions, logprobs=logprobs, lengths=lengths,
            tokenizer=load_tokenizer(tokenizer), length_penalty=length_penalty, teacher=teacher,
            skip_bad_rows=skip_bad_rows,
        )  # fmt: skip
        return _write(out, records, report)
    values: dict[str, Any] = {
        "model": model, "revision": revision, "quantization": quantization,
        "max_tokens_per_batch": max_tokens_per_batch, "tokenizer": tokenizer, "length_penalty": length_penalty,
        "on_no_answer": "skip" if skip_unanswered else "error",
    }  # fmt: skip
    if base_url is not None:
        values["server"] = {
            "base_url": base_url, "model": server_model or "", "api_key_env": api_key_env, "in_flight": in_flight,
            "price_in": price_in, "price_out": price_out, "max_cost": max_cost,
        }  # fmt: skip
    if generate:
        values["generate"] = {"n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    settings = from_options(ScoreSettings, values)
    rows, _ = (load_prompts if generate else load_candidates)(source, prompt)
    with Journal(out.with_suffix(".journal.jsonl")) as journal:
        if settings.server is not None:
            from tuna_peft.feedback.teacher_server import score_with_server

            records, report = score_with_server(
                rows, settings, journal, agree=lambda estimate: agree_to(estimate, settings.server, yes)
            )
        else:
            from tuna_peft.feedback.teacher import score_with_model

            records, report = score_with_model(rows, settings, journal, device=device)
    _write(out, records, report)


def _write(out: Path, records: list[Record], report: ScoreReport) -> None:
    from tuna_peft.files import write_jsonl

    write_jsonl(out, records)
    typer.echo(f"wrote {out}: {report.responses:,} responses to {report.scored:,} of {report.rows:,} prompts, ranked")
    for line in report.lines():
        typer.echo(f"  {line}")
