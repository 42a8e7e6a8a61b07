"""The command line, `tuna-peft`: parsing and printing. Each command imports what it needs when it runs."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """The entry point of `tuna-peft` and of `python -m tuna_peft`."""
    # Must be set before torch is loaded. By default OpenMP's threads wait in a busy loop. On a machine with other work
    # that makes small models many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Before CUDA starts: blocks that grow leave fewer gaps, as lengths differ from step to step. Linux only.
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # only the first of several processes shows progress bars

    if not sys.stderr.isatty():  # in a log their bars are carriage returns; `tuna_peft.progress` writes lines instead
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it, too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

    # What schedulers send before they kill counts as Ctrl-C: results so far are kept, and the exit code is 130.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from tuna_peft.cli.app import app

    app(prog_name="tuna-peft")
