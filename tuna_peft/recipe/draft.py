"""Writes a first recipe from a few decisions, with comments; `tuna-peft init` asks for them."""

from __future__ import annotations

import textwrap
from typing import Literal, get_args

import yaml

from tuna_peft.data.config import DataSource
from tuna_peft.data.suggest import data_block

Goal = Literal["rank", "sft-rank", "sft", "sample"]

GOALS: dict[Goal, str] = {
    "rank": "train on the ranking of the responses",
    "sft-rank": "fine-tune on the best responses, then train on the ranking",
    "sft": "fine-tune on the best (or only) response",
    "sample": "sample responses from the model, let it judge them, train on that ranking",
}
assert get_args(Goal) == tuple(GOALS)


def draft_recipe(name: str, source: DataSource, prompts: int, model: str, template: str, goal: Goal) -> str:
    """The text of a recipe that reads `source`.

    Args:
        name: Name of the recipe; its file is called like this.
        source: How to read the data.
        prompts: Number of prompts in the data; decides epochs and prompts per step.
        model: Hub id or path of the base.
        template: As in `PromptConfig`.
        goal: What to train; a key of `GOALS`.
    """
    # At least 30 steps where the data allows it.
    epochs = 3 if prompts < 1000 else 1
    batch = next((size for size in (16, 8, 4, 2) if epochs * prompts >= 30 * size), 1)
    stages = []
    if goal in ("sft", "sft-rank"):
        stages.append(_SFT.format(data=_data(source), epochs=epochs, batch=batch))
    if goal in ("rank", "sft-rank"):
        stages.append(_RANKING.format(name="ranking", data=_data(source), epochs=epochs, batch=batch))
    if goal == "sample":
        data = _SAMPLED.format(prompts=textwrap.indent(_data(source, "prompts"), "  "), model=_value(model))
        stages.append(_RANKING.format(name="contextual", data=data, epochs=epochs, batch=batch))
    values = {"name": _value(name), "model": _value(model), "template": _value(template), "goal": GOALS[goal]}
    return _RECIPE.format(file=name, **values) + "\n".join(stages)


def _value(text: str) -> str:
    """The text as a YAML scalar in one line."""
    return str(yaml.safe_dump(text, default_style='"' if "\n" in text else None, width=10**6)).partition("\n")[0]


def _data(source: DataSource, key: str = "data") -> str:
    return textwrap.indent(data_block(source).replace("data:", f"{key}:", 1), " " * 4)


_RECIPE = """\
# Written by `tuna-peft init`: {goal}.
#
#   tuna-peft data inspect {file}.yaml           # what the model sees, and which tokens carry loss
#   tuna-peft plan {file}.yaml --gpu T4          # does it fit?
#   tuna-peft run {file}.yaml --output runs/{file}
#
# Every key: docs/recipe-reference.md, or `tuna-peft schema --field stages.ranking.train.margin`.

name: {name}

base:
  model: {model}    # a Hub id or a folder

quantization:
  method: nf4    # 4 bits per weight; `none` trains on the unquantized base

prompt:
  template: {template}    # chat is the tokenizer's chat template; alpaca and none exist, or write your own text

lora:
  r: 16
  alpha: 32
  target_modules: all-linear

stages:
"""

_TRAIN = """\
    overflow: skip    # responses beyond max_length are skipped and counted
    train:
      learning_rate: {rate}
      num_train_epochs: {{epochs}}
      per_device_train_batch_size: {{batch}}    # prompts per optimizer step
"""

_SFT = """\
  - name: sft
    type: sft
{data}
""" + _TRAIN.format(rate="2.0e-4")

_RANKING = (
    """\
  - name: {name}
    type: ranking
{data}
"""
    + _TRAIN.format(rate="1.0e-4")
    + """\
      max_tokens_per_batch: auto    # a step is split into passes that fit into memory
      max_length: 1024
      margin: 0.1        # required lead per step in rank, in nats per token
      mle_weight: 1.0    # weight of the SFT loss beside the ranking loss
"""
)

_SAMPLED = """\
    data:
{prompts}
      sample: {{n: 4, max_new_tokens: 256}}
      # The model judges its own responses. A stronger judge is better:
      # judge: {{server: {{base_url: "https://...", model: "...", api_key_env: OPENAI_API_KEY}}}}
      judge: {{model: {model}}}"""
