"""The keys of a stage's `train`: fields of `trl.SFTConfig` or `tuna_peft.TunaConfig`.

Their definition is theirs, so it is read from the dataclasses; importing them brings torch, seconds rather than
milliseconds, which is why the schema itself does not.
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from tuna_peft.errors import did_you_mean
from tuna_peft.recipe.messages import expected
from tuna_peft.recipe.schema import StageType

# Fields that a recipe sets elsewhere, or that would work against the run directory. Saying where they went is kinder
# than accepting and ignoring them.
SET_ELSEWHERE = {
    "output_dir": "It is the run's folder: `--output`.",
    "run_name": "It is made of the recipe's `name` and the stage's.",
    "seed": "Set `seed` at the top of the recipe: it holds for every stage.",
    "adapter_name": "The adapter has the stage's `name`.",
    "overflow": "Set the stage's `overflow`.",
    "eval_strategy": "The recipe's `evaluation` measures before the first stage and after each.",
    "eval_on_start": "The recipe's `evaluation` measures before the first stage and after each.",
    "resume_from_checkpoint": "Running the same command again resumes by itself.",
    "load_best_model_at_end": "It keeps only one adapter of a stack.",
    "save_only_model": "A run resumes from optimizer state too.",
    "use_cpu": "Set `base.device: cpu`.",
    "model_init_kwargs": "Set `base`.",
    "trust_remote_code": "Set `base.trust_remote_code`.",
    "remove_unused_columns": "The data set type decides it.",
    "dataset_text_field": "Set the stage's `data`.",
    "dataset_kwargs": "Set the stage's `data`.",
    "chat_template_path": "Set `prompt.template`.",
    "eos_token": "It is the tokenizer's.",
    "pad_token": "It is the tokenizer's.",
    "do_train": "Every stage trains.",
    "do_eval": "Set the recipe's `evaluation`.",
    "do_predict": "Set the recipe's `evaluation`.",
    "local_rank": "The launcher sets it.",
    "parallelism_config": "A run uses one GPU.",
}
# Declared by the one type that argument parsers take; a recipe may say more.
_WIDER: dict[str, Any] = {"activation_memory": str | float}
_HUB = "Publish the finished run instead; a stage is not pushed while it trains."


@dataclass(frozen=True)
class TrainField:
    """One field of a trainer configuration.

    Args:
        name: Its key in `train`.
        annotation: Its type.
        default: Its default, None also where it is made by a factory.
        help: Its `metadata["help"]`.
        choices: The texts that it takes; empty when free.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    choices: tuple[str, ...]


@cache
def train_fields(stage_type: StageType) -> dict[str, TrainField]:
    """The fields that `train` of such a stage takes, by name. Imports trl or the trainer, and with them torch."""
    config = _config_class(stage_type)
    hints = typing.get_type_hints(config)
    fields = {}
    for field in dataclasses.fields(config):
        if field.init and elsewhere(field.name) is None:
            annotation = _WIDER.get(field.name, hints[field.name])
            fields[field.name] = TrainField(
                field.name,
                annotation,
                None if field.default is dataclasses.MISSING else _plain(field.default),
                " ".join(str(field.metadata.get("help", "")).split()),
                tuple(field.metadata.get("choices", ())) or _named_values(annotation),
            )
    return fields


def check_train(stage_type: StageType, train: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    """`(key, what, fix)` for every key of `train` that is unknown, set elsewhere, or has a wrong value."""
    fields = train_fields(stage_type)
    found: list[tuple[str, str, str | None]] = []
    for key, value in train.items():
        fix = elsewhere(key)
        if fix is not None:
            found.append((key, "this is not set in `train`.", fix))
        elif key not in fields:
            config = {"sft": "trl.SFTConfig", "ranking": "tuna_peft.TunaConfig"}[stage_type]
            found.append((key, f"{config} has no such field.", did_you_mean(key, fields)))
        else:
            problem = _wrong_value(fields[key], value)
            if problem:
                found.append((key, *problem))
    return found


def elsewhere(key: str) -> str | None:
    """Where a field that `train` does not take is set; None for all others."""
    return _HUB if key == "push_to_hub" or key.startswith("hub_") else SET_ELSEWHERE.get(key)


def type_adapter(annotation: Any) -> TypeAdapter[Any]:
    """Pydantic's view of a field's type. Raises PydanticUserError when the type brings a configuration of its own."""
    return TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _config_class(stage_type: StageType) -> Any:
    if stage_type == "sft":
        from trl import SFTConfig

        return SFTConfig
    from tuna_peft.training.config import TunaConfig

    return TunaConfig


def _wrong_value(field: TrainField, value: Any) -> tuple[str, str | None] | None:
    if field.choices and isinstance(value, str) and value not in field.choices:
        return f"{value!r} is not one of its values.", did_you_mean(value, field.choices)
    try:
        type_adapter(field.annotation).validate_python(value)
    except ValidationError as error:
        return expected(error.errors(), value), None
    except PydanticUserError:
        return None
    return None


def _named_values(annotation: Any) -> tuple[str, ...]:
    """The values of a `Literal`, or of an enumeration in `annotation`, such as `SchedulerType | str`."""
    if typing.get_origin(annotation) is typing.Literal:
        return tuple(typing.get_args(annotation))
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and not typing.get_args(part) and issubclass(part, enum.Enum):
            return tuple(str(member.value) for member in part)
    return ()


def _plain(default: Any) -> Any:
    return default.value if isinstance(default, enum.Enum) else default
