"""Writes planned memory and hours into docs and recipes: `python -m benchmarks.hardware`.

docs/planning.md gets the tables of recipes and models by GPU, README.md the short table, and the comment at the top of
every recipe its expected peak and hours. `--check` writes nothing and exits with 1 when something is not up to date.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tuna_peft.cli.plan_output import hours_text
from tuna_peft.limits import GIB
from tuna_peft.planning.from_recipe import plan_recipe
from tuna_peft.planning.gpus import find_gpu
from tuna_peft.planning.plan import Plan
from tuna_peft.planning.sizes import sizes_of
from tuna_peft.planning.spec import Device
from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.shipped import shipped_recipes

ROOT = Path(__file__).parents[1]
GPUS = ("RTX 4060 8GB", "RTX 3060 12GB", "T4", "RTX 4090", "A100 40GB", "RTX 6000 Ada", "A100 80GB", "H100 80GB")
MODELS = (
    "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "Qwen/Qwen3-4B", "meta-llama/Llama-2-7b-hf",
    "mistralai/Mistral-7B-v0.3", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B",
    "meta-llama/Llama-2-13b-hf", "Qwen/Qwen3-14B", "Qwen/Qwen3-32B", "meta-llama/Llama-3.1-70B",
)  # fmt: skip
README_MODELS = (
    "meta-llama/Llama-3.2-1B", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-3.1-70B",
)  # fmt: skip
# Models and GPUs whose sizes docs/performance.md shows.
SIZED = (
    ("meta-llama/Llama-3.2-1B", "RTX 4060 8GB"), ("meta-llama/Llama-3.2-3B", "RTX 4060 8GB"),
    ("meta-llama/Llama-2-7b-hf", "T4"), ("meta-llama/Llama-3.1-8B", "RTX 3060 12GB"),
    ("meta-llama/Llama-3.1-8B", "RTX 4090"), ("meta-llama/Llama-2-13b-hf", "RTX 4090"),
    ("meta-llama/Llama-3.1-8B", "A100 40GB"), ("meta-llama/Llama-3.1-8B", "H100 80GB"),
    ("meta-llama/Llama-3.1-8B", "H200"), ("meta-llama/Llama-3.1-70B", "RTX 6000 Ada"),
    ("meta-llama/Llama-3.1-70B", "H100 80GB"),
)  # fmt: skip
# A stage that samples its own responses: four of 256 tokens.
_SAMPLING = (
    "stages.contextual.data={prompts: {path: data/prompts.jsonl}, judge: {function: builtin:pico}, "
    "sample: {n: 4, max_new_tokens: 256, batch_size: auto}}"
)
# The lines at the top of a recipe that this program writes; they name the GPU that the recipe is planned for.
_HEAD = re.compile(r"^# Expected peak:(?:.|\n#)*? --gpu \"?(?P<gpu>[^\n\"]+)\"?$", re.MULTILINE)


def files() -> Iterator[tuple[Path, str]]:
    """Every file that has planned numbers, and the text that it should have."""
    recipes = {name: file for name, file in shipped_recipes().items() if _HEAD.search(file.read_text("utf-8"))}
    for name, file in recipes.items():
        text = file.read_text("utf-8")
        yield file, _HEAD.sub(lambda found, name=name: _head(name, found["gpu"]), text, count=1)
    performance = ROOT / "docs" / "performance.md"
    yield performance, _between(performance.read_text("utf-8"), "sizes", _sizes())
    docs, readme = ROOT / "docs" / "planning.md", ROOT / "README.md"
    text = _between(docs.read_text("utf-8"), "recipes", _table((name, name, ()) for name in recipes))
    models = (("two-stage", model.rpartition("/")[2], (f"base.model={model}",)) for model in MODELS)
    yield docs, _between(text, "models", _table(models))
    models = (("two-stage", model.rpartition("/")[2], (f"base.model={model}",)) for model in README_MODELS)
    yield readme, _between(readme.read_text("utf-8"), "models", _table(models))


def _head(name: str, gpu: str) -> str:
    [plan] = _plans(name, (), [gpu])
    return (
        f"# Expected peak: {plan.needed / GIB:.1f} GiB, up to {plan.peak / GIB:.1f} GiB used for speed, "
        f"{hours_text(plan.hours)} hours. Planned, for 10,000\n"
        f'# prompts a stage with four responses of 200 tokens: tuna-peft plan {name} --gpu "{gpu}"'
    )


def _table(rows: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    lines = ["| | " + " | ".join(GPUS) + " |", "|---" * (len(GPUS) + 1) + "|"]
    for recipe, title, overrides in rows:
        cells = [
            f"{plan.needed / GIB:.1f}, {hours_text(plan.hours)} h" if plan.fits else "–"
            for plan in _plans(recipe, overrides, GPUS)
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sizes() -> str:
    lines = [
        "| model | GPU | tokens a pass | layers that keep activations | sampled at once | scored at once | peak GiB |"
    ]
    lines.append("|---" * 7 + "|")
    for model, gpu in SIZED:
        [plan] = _plans("two-stage", (f"base.model={model}", _SAMPLING), [gpu])
        phases = {phase.name: phase for phase in plan.phases}
        sizes = sizes_of(plan.run)
        kept = phases["train probabilistic"].note.split()[0]
        tokens = sizes["stages.probabilistic.train.max_tokens_per_batch"]
        lines.append(
            f"| {model.rpartition('/')[2]} | {gpu} | {tokens:,} | {kept} "
            f"| {sizes['stages.contextual.data.sample.batch_size']} | {plan.run.evaluation['ranking'].batch_size} "
            f"| {plan.peak / GIB:.1f} of {plan.device.memory / GIB:.1f} |"
        )
    return "\n".join(lines)


def _plans(recipe: str, overrides: Sequence[str], gpus: Sequence[str]) -> list[Plan]:
    loaded = load_recipe(recipe, overrides, check=False)
    return plan_recipe(loaded, [Device.of(find_gpu(gpu)) for gpu in gpus])[0]


def _between(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- plan of {name}: python -m benchmarks.hardware -->", "<!-- end -->"
    before, found, rest = text.partition(begin)
    if not found:
        raise ValueError(f"the file has no line {begin}")
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 when something differs.")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # use the package's table of models, so that the result is the same everywhere
    differing = 0
    for file, text in files():
        if file.read_text("utf-8") != text:
            differing += 1
            print(f"{file.relative_to(ROOT)}: {'is not up to date' if options.check else 'written'}")
            if not options.check:
                file.write_text(text, encoding="utf-8")
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
