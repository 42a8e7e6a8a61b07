"""`tuna-peft schema`."""

from __future__ import annotations

from typing import Annotated

import typer

from tuna_peft.terminal import echo


def schema(
    field: Annotated[
        str | None,
        typer.Option(
            "--field", help="Print only the help of this key: lora.r, stages.train.margin ...", show_default=False
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all keys as a page of Markdown.")] = False,
) -> None:
    """Print the JSON schema of recipes, for completion in an editor, or the help of one key."""
    import json

    from tuna_peft.recipe.json_schema import field_help, recipe_json_schema

    if markdown:
        from tuna_peft.recipe.reference import recipe_reference

        echo(recipe_reference(), nl=False)
        return
    echo(field_help(field) if field else json.dumps(recipe_json_schema(), indent=2))
