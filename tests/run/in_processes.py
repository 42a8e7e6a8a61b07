"""One process of a run under a launcher: `in_processes.py RECIPE OUTPUT [STEPS]`; crashes after STEPS steps."""

import sys

from test_pipeline import Crash, _with

import tuna_peft.run.train_stage as train_stage_module
from tuna_peft.recipe.load import load_recipe
from tuna_peft.run.pipeline import run_recipe

if __name__ == "__main__":
    recipe, output, *after = sys.argv[1:]
    if after:
        crash, real = Crash(int(after[0])), train_stage_module._trainer
        train_stage_module._trainer = lambda *args: _with(real(*args), crash)
    run_recipe(load_recipe(recipe), output)
