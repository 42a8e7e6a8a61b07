"""No number of a recipe may be NaN, infinite, too large for 64 bits, or outside the range of its field."""

from __future__ import annotations

import math
import typing

import pytest
from pydantic import BaseModel, ValidationError

from tuna_peft.feedback.settings import JudgeSettings
from tuna_peft.recipe.schema import Recipe
from tuna_peft.recipe.train_fields import check_train
from tuna_peft.training.config import TunaConfig

ANY_SIGN = [(JudgeSettings, "seed")]


def parts(annotation):
    yield annotation
    for part in typing.get_args(annotation):
        yield from parts(part)


def sections(model, known):
    known[model] = None
    for field in model.model_fields.values():
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel) and part not in known:
                sections(part, known)
    return known


NUMBERS = [
    (section, name)
    for section in sections(Recipe, {})
    for name, field in section.model_fields.items()
    if {int, float} & set(parts(field.annotation))
]


def is_refused(section, name, value) -> bool:
    """Whether an error is about this field: others of the section may be missing."""
    field = section.model_fields[name]
    try:
        section.model_validate({field.alias or name: value}, strict=True)
    except ValidationError as error:
        return any(entry["loc"][:1] == (field.alias or name,) for entry in error.errors())
    return False


@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_every_number_of_a_section_is_finite_and_not_negative(section, name):
    whole = section.model_fields[name].annotation
    lists = any(typing.get_origin(part) is list for part in parts(whole))
    for value in (math.nan, math.inf, -math.inf, 10**30, *(() if (section, name) in ANY_SIGN else (-1,))):
        assert is_refused(section, name, [value] if lists else value), value


def test_the_walk_finds_the_numbers():
    found = {(section.__name__, name) for section, name in NUMBERS}
    assert {("LoraSettings", "dropout"), ("SuperNITask", "shots"), ("ServerSettings", "timeout")} <= found


@pytest.mark.parametrize(
    ("field", "wrong", "right"),
    [
        ("learning_rate", [0, -1e-4, math.nan, math.inf], [1e-30, 1]),
        ("max_steps", [0, -2], [-1, 1]),
        ("num_train_epochs", [0, -1.0], [0.1]),
        ("per_device_train_batch_size", [0, -8], [1]),
        ("gradient_accumulation_steps", [0], [1]),
        ("weight_decay", [-0.1, math.nan], [0, 0.1]),
        ("adam_beta2", [1, -0.1], [0, 0.999]),
        ("max_grad_norm", [-1.0, math.inf], [0]),
        ("max_length", [0, 1, -5], [2, None]),
        ("logging_steps", [0, -1], [0.5, 1]),
        ("save_total_limit", [0], [1, None]),
        ("data_seed", [-1, 2**32], [0, None]),
        ("ddp_bucket_cap_mb", [10**30], [25]),
        ("lr_scheduler_kwargs", [{"num_cycles": math.nan}], [{"num_cycles": 0.5}]),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "ranking"])
def test_ranges_of_the_fields_of_train(kind, field, wrong, right):
    for value in wrong:
        assert [key for key, *_ in check_train(kind, {field: value})] == [field], value
    for value in right:
        assert check_train(kind, {field: value}) == []


@pytest.mark.parametrize(
    ("field", "wrong", "right"),
    [
        ("margin", [-0.1, math.nan, math.inf], [0]),
        ("beta", [0, -1], [0.1]),
        ("length_penalty", [-1, math.nan], [0]),
        ("mle_weight", [-1, math.inf], [0]),
        ("max_tokens_per_batch", [0], [1, None]),
        ("activation_memory", [-1.0, math.nan], [0.0, "auto"]),
    ],
)
def test_ranges_of_the_ranking_fields(tmp_path, field, wrong, right):
    for value in wrong:
        assert [key for key, *_ in check_train("ranking", {field: value})] == [field], value
        with pytest.raises(ValueError, match=field):
            TunaConfig(str(tmp_path), use_cpu=True, **{field: value})
    for value in right:
        assert check_train("ranking", {field: value}) == []
        TunaConfig(str(tmp_path), use_cpu=True, **{field: value})
