"""Resolved stages: names, adapters below, the model to sample from, defaults, and the trainer's number of steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments

from tuna_peft.recipe.resolved import resolve_stages, stage_names, steps_per_epoch, total_steps
from tuna_peft.recipe.schema import Recipe
from tuna_peft.training.config import TunaConfig

FILE = {"path": "ranked.jsonl"}
JUDGE = {"function": "builtin:pico"}


def recipe(*stages: dict) -> Recipe:
    return Recipe.model_validate({"name": "x", "base": {"model": "builtin:pico-llama"}, "stages": list(stages)})


def ranked(name: str, **more: object) -> dict:
    return {"name": name, "type": "ranking", "data": FILE, **more}


def sampled(name: str, source: str | None = None, **more: object) -> dict:
    data = {"prompts": FILE, "sample": {"n": 3, "max_new_tokens": 7, "from": source}, "judge": JUDGE}
    return {"name": name, "type": "ranking", "data": data, **more}


def test_a_stage_trains_on_all_adapters_before_it():
    a, b, c = resolve_stages(recipe(ranked("a"), ranked("b"), ranked("c")))
    assert (a.below, b.below, c.below) == ((), ("a",), ("a", "b"))
    assert {stage.replaces for stage in (a, b, c)} == {stage.replaced_by for stage in (a, b, c)} == {None}


def test_rounds_are_stages_of_their_own():
    stages = resolve_stages(recipe(ranked("a"), sampled("b", "base", rounds=3), ranked("c")))
    assert [stage.name for stage in stages] == ["a", "b-1", "b-2", "b-3", "c"]
    assert [stage.section for stage in stages] == ["a", "b", "b", "b", "c"]
    assert [stage.key for stage in stages[:2]] == ["stages.a", "stages.b"]
    assert stages[4].below == ("a", "b-1", "b-2", "b-3")
    # The first round samples from the model that the recipe names, the others from the round before.
    assert [stage.samples_from for stage in stages[1:4]] == [(), ("a", "b-1"), ("a", "b-1", "b-2")]
    assert stage_names(recipe(sampled("b", rounds=2))) == ["base", "b-1", "b-2"]


def test_rounds_that_continue_one_adapter_replace_each_other():
    stages = resolve_stages(recipe(ranked("a"), sampled("b", rounds=3, continue_adapter=True), ranked("c")))
    assert [stage.below for stage in stages] == [(), ("a",), ("a",), ("a",), ("a", "b-3")]
    assert [stage.replaces for stage in stages] == [None, None, "b-1", "b-2", None]
    assert [stage.replaced_by for stage in stages] == [None, "b-2", "b-3", None, None]
    assert stages[2].samples_from == ("a", "b-1")


def test_a_stage_that_continues_the_one_before_replaces_it():
    stages = resolve_stages(
        recipe(
            ranked("a"), ranked("b", continue_adapter=True), sampled("c", "b", continue_adapter=True), ranked("d"),
            sampled("e", "c"),
        )
    )  # fmt: skip
    assert [stage.below for stage in stages] == [(), (), (), ("c",), ("c", "d")]
    assert [stage.replaces for stage in stages] == [None, "a", "b", None, None]
    assert [stage.replaced_by for stage in stages] == ["b", "c", None, None, None]
    assert stages[2].samples_from == ("b",) and stages[4].samples_from == ("c",)
    with pytest.raises(ValidationError, match=r"samples from `a`, which is not an earlier stage \(base, b, c\)"):
        recipe(ranked("a"), ranked("b", continue_adapter=True), ranked("c"), sampled("d", "a"))


def test_samples_come_from_the_stage_that_the_recipe_names():
    stages = resolve_stages(recipe(ranked("a"), ranked("b"), sampled("c", "a"), sampled("d", "base"), sampled("e")))
    assert [stage.samples_from for stage in stages[2:]] == [("a",), (), ("a", "b", "c", "d")]


def test_what_is_generated():
    server = {"base_url": "http://localhost:1/v1", "model": "m"}
    generate = {"server": server, "generate": {"n": 5, "max_tokens": 9}}
    scored = {"name": "d", "type": "ranking", "data": {"prompts": FILE, "score": generate}}
    given = {"name": "e", "type": "ranking", "data": {"prompts": FILE, "judge": JUDGE}}
    stages = resolve_stages(recipe(ranked("a"), sampled("c"), scored, given))
    assert [stage.generated for stage in stages] == [None, (3, 7), (5, 9), None]


def test_the_stage_overrides_lora_and_the_trainer_fills_in_its_defaults():
    sft = {"name": "s", "type": "sft", "data": FILE, "lora": {"r": 4}, "train": {"max_length": 12}}
    first, second = resolve_stages(recipe(sft, ranked("a", train={"mle_on": "reference"})))
    assert (first.lora.r, first.lora.alpha, second.lora.r) == (4, 32, 16)
    assert (first.max_length, second.max_length) == (12, TunaConfig.__dataclass_fields__["max_length"].default)
    assert (first.needs_reference, second.needs_reference) == (False, True)
    assert second.train["margin"] == 0.1 and "margin" not in second.train_overrides
    assert (first.checkpoints_activations, second.checkpoints_activations) == (True, True)
    off = resolve_stages(recipe(ranked("a", train={"gradient_checkpointing": False})))
    assert not off[0].checkpoints_activations


@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_are_those_that_the_trainer_counts(drop_last, tmp_path):
    """Against transformers' own count, over sizes where the last batch and the last step are short."""
    for rows, batch, accumulation, epochs in itertools.product((1, 7, 16, 19), (1, 3, 16), (1, 2, 5), (1, 0.3, 2.5)):
        if drop_last and rows < batch:
            continue  # no batch at all, which the trainer refuses
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs, dataloader_drop_last=drop_last, use_cpu=True, report_to="none",
        )  # fmt: skip
        data = Dataset.from_dict({"input": list(range(rows))})
        trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=data)
        counted = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
        per_epoch = steps_per_epoch(rows, batch, accumulation, drop_last=drop_last)
        assert total_steps(per_epoch, epochs, -1) == counted, (rows, batch, accumulation, epochs)
    assert total_steps(3, 2.0, 5) == 5
