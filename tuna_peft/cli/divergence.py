"""`tuna-peft divergence`: the KL divergence of exports from their stack. `combine` and `merge` print it, too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuna_peft.cli.data_options import DataOptions
from tuna_peft.cli.options import BasePath, Prompts, Stack
from tuna_peft.json_text import read_json
from tuna_peft.terminal import console, echo

if TYPE_CHECKING:
    from tuna_peft.export.compare_exports import ExportOption

PROMPTS = 16


def divergence(
    stack: Stack,
    exports: Annotated[list[Path], typer.Argument(help="Folders written by combine, merge or export gguf.")],
    upto: Annotated[
        str | None,
        typer.Option("--upto", help="Compare exports made from the stack up to this stage.", show_default="all"),
    ] = None,
    base_model: BasePath = None,
    prompts: Prompts = None,
) -> None:
    """Measure the KL divergence of adapters, merged models and GGUF files from their stack (unmerged adapters)."""
    from tuna_peft.models.stack.find import find_stack

    source = find_stack(stack)
    ids = comparison_prompts(source, prompts, base_model)
    print_divergence(source, exports, ids, upto=upto, base_model=base_model)


def comparison_prompts(stack: Path, data: str | None, base_model: str | None) -> list[list[int]]:
    """Token ids of some prompts of `data`; without data, the prompts that the stack's run measured on, or none.

    Raises:
        UserError: The data cannot be read, or the base has no tokenizer.
    """
    if data is None:
        file = stack.parent / "divergence_prompts.json"
        return read_json(file) if file.is_file() else []

    from transformers import AutoTokenizer

    from tuna_peft.data.config import PromptConfig
    from tuna_peft.data.load import load_prompts
    from tuna_peft.data.texts import prompt_ids, set_template_date
    from tuna_peft.export.base_files import locate_base
    from tuna_peft.models.stack.manifest import read_manifest
    from tuna_peft.run.recipe_data import find_recipe_of_data

    manifest = read_manifest(stack)
    tokenizer = AutoTokenizer.from_pretrained(locate_base(manifest, base_model, stack))
    prompt = PromptConfig.model_validate(manifest.prompt)
    set_template_date(tokenizer, prompt.date)
    run = find_recipe_of_data(str(stack.parent))
    source, _ = DataOptions().source(data, default=run and run[0])
    records, _ = load_prompts(source.model_copy(update={"limit": PROMPTS}), prompt)
    return [prompt_ids(record["prompt"], tokenizer, record.get("tools")) for record in records]


def print_divergence(
    stack: Path, exports: list[Path], prompts: list[list[int]], *, upto: str | None, base_model: str | None
) -> None:
    """Loads the stack and the exports, one after the other, and prints how far each export is from the stack."""
    from transformers.utils import logging

    from tuna_peft.export.check import check_exports

    logging.disable_progress_bar()
    for path, measured in check_exports(stack, exports, prompts, upto=upto, base_model=base_model).items():
        echo(f"{path}: KL divergence from the stack: {measured}")


def print_routes(routes: Iterable[ExportOption]) -> None:
    """Prints a table of all export options when the last one is measured."""
    from rich.table import Table
    from transformers.utils import logging

    logging.disable_progress_bar()
    table = Table("export", title="KL divergence from the stack")
    for heading in ("MB", "kept", "KL, mean", "logit", "top-1"):
        table.add_column(heading, justify="right")
    tokens, noise = 0, False
    for route in routes:
        size = "-" if route.nbytes is None else f"{route.nbytes / 1e6:,.1f}"
        if (measured := route.divergence) is None:
            echo(f"not possible: {route.name}: {route.reason}", err=True)
            table.add_row(route.name, size, "", "not possible")
            continue
        echo(f"measured {route.name}", err=True)
        tokens, noise = measured.tokens, noise or route.is_noise
        table.add_row(
            route.name,
            size,
            "" if route.kept_share is None else f"{route.kept_share:.1%}",
            f"{'*' if measured.is_noise else ''}{measured.kl_mean:.1e}",
            f"{measured.logit_max:.1e}",
            f"{measured.top1_agreement:.1%}",
        )
    table.caption = (
        f"KL divergence in nats, after each of {tokens:,} tokens, computed in fp32; kept: share of the update after "
        "rounding; logit: largest difference; top-1: same next token"
    )
    if noise:
        table.caption += "; *: below the noise of the dtype of training (unmerged adapters in that dtype)"
    console().print(table)
