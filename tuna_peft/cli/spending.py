"""Before money is spent: what will be asked, and a yes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from tuna_peft.errors import UserError

if TYPE_CHECKING:
    from tuna_peft.feedback.settings import ServerSettings
    from tuna_peft.feedback.spending import Estimate


def agree_to(estimate: Estimate, server: ServerSettings | None, yes: bool) -> None:
    """Says what will be asked; where it may cost money, only goes on with a yes.

    Args:
        estimate: What is still to be asked.
        server: None for a model that runs here.
        yes: The user has said it already.

    Raises:
        UserError: Nobody can be asked.
    """
    if not estimate.requests:
        return
    parts = [f"{estimate.requests:,} questions to ask ({estimate.found:,} are answered already)"]
    parts.append(f"about {estimate.tokens_in:,} tokens in, at most {estimate.tokens_out:,} out")
    if estimate.cost is not None:
        parts.append(f"at most {estimate.cost:,.2f} in the prices' currency if each is readable at once")
    typer.echo("; ".join(parts), err=True)
    if yes or server is None or estimate.cost == 0 or (estimate.cost is None and server.is_local):
        return
    what = "this may cost money" if estimate.cost is not None else "this may cost money (--price-in and --price-out)"
    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError(f"{what}, and nobody can be asked", where=server.base_url, fix="Say --yes.")
    typer.confirm(f"{what}; go on?", abort=True, err=True)
