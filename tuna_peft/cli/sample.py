"""`tuna-peft sample`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuna_peft.cli.data_options import DataOptions, reads_data
from tuna_peft.cli.options import (
    AnyModel,
    Device,
    OtherTemplate,
    Quantization,
    StackBase,
    Upto,
    Yes,
    from_options,
    require_jsonl,
)
from tuna_peft.cli.settings_options import SettingsCommand
from tuna_peft.cli.spending import confirm_spending
from tuna_peft.terminal import echo

if TYPE_CHECKING:
    from tuna_peft.data.config import PromptConfig
    from tuna_peft.feedback.sampling import Sampler
    from tuna_peft.feedback.server_sampler import ServerSampler


class SampleCommand(SettingsCommand):
    """Options of `SampleSettings`."""

    settings, panel = "SampleSettings", "Sampling"


@reads_data("template")
def sample(
    context: typer.Context,
    source_model: AnyModel,
    prompts: Annotated[
        str, typer.Argument(help="Prompts, in any format that can be read; or a recipe or run, or RECIPE@STAGE.")
    ],
    out: Annotated[Path, typer.Argument(help="The .jsonl file to write.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the samples; each prompt has its own.")] = 0,
    upto: Upto = None,
    base_model: StackBase = None,
    quantization: Quantization = "none",
    device: Device = "auto",
    template: OtherTemplate = None,
    yes: Yes = False,
    *,
    reading: DataOptions,
) -> None:
    """Sample several different responses to each prompt. If interrupted, run the same command again to resume.

    With --server, MODEL gives the tokenizer and the prompt template; its weights are not loaded.
    """
    from tuna_peft.data.config import PromptConfig
    from tuna_peft.data.load import load_prompts
    from tuna_peft.feedback.sampling import sample_candidates
    from tuna_peft.feedback.settings import SampleSettings
    from tuna_peft.files import write_jsonl
    from tuna_peft.journal import Journal
    from tuna_peft.planning.command_sizes import sized_sampling
    from tuna_peft.run.samplers import open_sampler, remote_sampler

    settings = from_options(SampleSettings, context.obj)
    wanted = None if template is None else from_options(PromptConfig, {"template": template})
    require_jsonl(out)
    source, _ = reading.source(prompts)
    if (server := settings.server) is not None:
        opened: AbstractContextManager[tuple[Sampler | ServerSampler, PromptConfig]] = remote_sampler(
            source_model, server, lambda estimate: confirm_spending(estimate, server, yes), upto=upto,
            base_model=base_model,
        )  # fmt: skip
    else:
        opened = open_sampler(
            source_model, settings.backend, upto=upto, base_model=base_model, quantization=quantization, device=device
        )
    with opened as (sampler, recorded):
        records, read = load_prompts(source, wanted or recorded)
        with Journal(out.with_suffix(".journal.jsonl")) as journal:
            settings = sized_sampling(settings, source_model, quantization, records, journal, device)
            found, report = sample_candidates(sampler, records, settings, journal, seed=seed)
    write_jsonl(out, found)
    echo(f"wrote {out}: {report.responses:,} responses to {report.kept:,} of {read.read:,} prompts")
    for line in report.lines():
        echo(f"  {line}")
