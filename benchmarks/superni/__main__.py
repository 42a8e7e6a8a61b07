"""Runs the experiment of `docs/experiments/smollm2-superni.md`; each command resumes where it was stopped.

    python -m benchmarks.superni prepare --work runs/superni --data DATA --model HuggingFaceTB/SmolLM2-135M-Instruct
    python -m benchmarks.superni teachers --work runs/superni
    python -m benchmarks.superni run --work runs/superni --data DATA
    python -m benchmarks.superni table --work runs/superni

DATA holds `superni/` (a checkout of allenai/natural-instructions, or `train_instances.jsonl` and
`test_instances.jsonl`) and, as far as they are to be measured, `ranked/alpaca_eval.jsonl` and `lmentry/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import datasets
from transformers.utils import logging as transformers_logging

from benchmarks.superni.arms import ARMS
from benchmarks.superni.prepare import Prepared, compare_teachers, prepare
from benchmarks.superni.runs import Runs
from benchmarks.superni.sets import deal, read_instances, write_sets
from benchmarks.superni.sizes import SIZES
from benchmarks.superni.tables import markdown
from tuna_peft.errors import UserError
from tuna_peft.models.base.load import load_config_and_tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.superni", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sets = commands.add_parser("sets", help="only the sets: what recipes/smollm2-135m.yaml trains on")
    first = commands.add_parser("prepare", help="sets, own samples, ranked lists")
    teachers = commands.add_parser("teachers", help="how often teachers agree with the grader; probabilistic lists")
    run = commands.add_parser("run", help="train and measure the arms")
    table = commands.add_parser("table", help="print tables and verdicts")
    for command in (sets, first, teachers, run, table):
        command.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="everything is kept here")
    for command in (sets, first, run):
        command.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    for command in (sets, first):
        command.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder")
        command.add_argument(
            "--size",
            default="full",
            choices=list(SIZES),
            help="small: for a slow CPU; cut: only to see it run",
        )
    first.add_argument("--quantization", default="nf4", choices=["nf4", "none"])
    teachers.add_argument("--teacher", action="append", default=[], metavar="MODEL", help="another model to compare")
    teachers.add_argument("--prompts", type=int, metavar="N", help="only the first N prompts, and no lists")
    run.add_argument("--rates", nargs="+", type=float, metavar="RATE", help="only these learning rates, with seed 0")
    run.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        _run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.command == "sets":
        tokenizer = load_config_and_tokenizer(options.model)[1]
        dealt = deal(*read_instances(options.data / "superni"), tokenizer, SIZES[options.size])
        write_sets(dealt, options.work)
        print(", ".join(f"{name} {len(records)}" for name, records in dealt.items()))
    elif options.command == "prepare":
        prepared = prepare(options.work, options.data, options.model, options.quantization, SIZES[options.size])
        print(prepared.samples)
    elif options.command == "teachers":
        found = compare_teachers(Prepared.read(options.work), options.teacher, options.prompts)
        for name, one in found["teachers"].items():
            share = f"{one['share']:.1%} [{one['low']:.1%}, {one['high']:.1%}]"
            print(f"{name}: {share} of {one['pairs']} pairs, {one['prompts']} prompts")
        print(f"teacher: {found['chosen'] or 'none is good enough'}; lists: {found['lists']}")
    else:
        # Without `--data`, as for tables, nothing is measured.
        prepared = Prepared.read(options.work)
        if options.command == "run" and options.rates:
            only = {"rates": tuple(sorted(options.rates)), "lower": None, "higher": None, "seeds": 1}
            prepared = dataclasses.replace(prepared, sizes=dataclasses.replace(prepared.sizes, **only))
        runs = Runs(prepared, getattr(options, "data", options.work))
        if options.command == "run":
            runs.run(options.arms)
        print(markdown(runs.rows))


if __name__ == "__main__":
    sys.exit(main())
