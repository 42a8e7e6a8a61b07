"""Asks the user before money is spent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuna_peft.cli.consent import ask
from tuna_peft.terminal import echo

if TYPE_CHECKING:
    from tuna_peft.feedback.settings import ServerSettings
    from tuna_peft.feedback.spending import Estimate


def confirm_spending(estimate: Estimate, server: ServerSettings | None, yes: bool) -> None:
    """Prints what will be asked. If it may cost money, asks the user to confirm.

    Args:
        estimate: The questions without an answer.
        server: None for a judge or teacher on this machine.
        yes: Do not ask the user (`--yes`).

    Raises:
        UserError: The user cannot be asked, because there is no terminal.
    """
    if not estimate.requests:
        return
    parts = [f"{estimate.requests:,} questions to ask ({estimate.found:,} are answered already)"]
    parts.append(f"about {estimate.tokens_in:,} tokens in, at most {estimate.tokens_out:,} out")
    if estimate.cost is not None:
        parts.append(f"at most {estimate.cost:,.2f} in the prices' currency if every first answer can be read")
    echo("; ".join(parts), err=True)
    if yes or server is None or estimate.cost == 0 or (estimate.cost is None and server.is_local):
        return
    what = "this may cost money" if estimate.cost is not None else "this may cost money (--price-in and --price-out)"
    ask(what, server.base_url)
