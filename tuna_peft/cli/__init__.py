"""The command line, `tuna-peft`: parsing and printing. Each command imports what it needs when it runs."""

from __future__ import annotations


def main() -> None:
    """The entry point of `tuna-peft` and of `python -m tuna_peft`."""
    from tuna_peft.cli.app import app

    app(prog_name="tuna-peft")
