"""One process of a run under a launcher: `in_processes.py RECIPE OUTPUT [STEPS]`; crashes after STEPS steps.

Writes to `OUTPUT.RANK` how many batches this process has generated and scored.
"""

import json
import os
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

from test_pipeline import Crash, _with

import tuna_peft.run.train_stage as train_stage_module
from tuna_peft.models.forward import scoring
from tuna_peft.models.generation import generate
from tuna_peft.recipe.load import load_recipe
from tuna_peft.run import processes
from tuna_peft.run.pipeline import run_recipe

if __name__ == "__main__":
    recipe, output, *after = sys.argv[1:]
    if after:
        crash, real = Crash(int(after[0])), train_stage_module._trainer
        train_stage_module._trainer = lambda *args: _with(real(*args), crash)
    computed: Counter = Counter()

    def counted(name, function):
        def call(*args):
            computed[name] += 1
            return function(*args)

        return call

    generate._Decoder.run = counted("generated", generate._Decoder.run)
    scoring.response_logps = counted("scored", scoring.response_logps)
    if seconds := os.environ.get("CONNECT_SECONDS"):
        processes._CONNECT = timedelta(seconds=int(seconds))
    run_recipe(load_recipe(recipe), output)
    Path(f"{output}.{os.environ['RANK']}").write_text(json.dumps(computed))
