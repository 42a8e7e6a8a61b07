"""The command line, `tuna-peft`: parsing and printing. Each command imports what it needs when it runs."""

from __future__ import annotations

import os


def main() -> None:
    """The entry point of `tuna-peft` and of `python -m tuna_peft`."""
    # Read when torch is loaded. On a machine with other work, CPU threads that spin while they wait for one that has
    # lost its core make small models many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # of several processes one shows its progress

    from tuna_peft.cli.app import app

    app(prog_name="tuna-peft")
