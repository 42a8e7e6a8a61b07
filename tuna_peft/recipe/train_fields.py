"""The keys of a stage's `train`: the fields of `trl.SFTConfig` or `tuna_peft.TunaConfig`.

They are read from these dataclasses, so that every version of trl has its own fields. Importing the dataclasses loads
torch, which takes seconds; the schema of recipes does not import them.
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
from tuna_peft.training.ranges import out_of_range

# Fields that a recipe sets elsewhere, or that conflict with the run's folder. Each is an error that says what to set
# instead, because an ignored key would be a silent mistake.
SET_ELSEWHERE = {
    "output_dir": "It is the run's folder: `--output`.",
    "run_name": "It consists of the recipe's `name` and the stage's.",
    "seed": "Set `seed` at the top of the recipe: it holds for every stage.",
    "adapter_name": "The adapter has the stage's `name`.",
    "overflow": "Set the stage's `overflow`.",
    "eval_strategy": "Set the recipe's `evaluation`, which runs before the first stage and after each.",
    "eval_on_start": "Set the recipe's `evaluation`, which runs before the first stage and after each.",
    "resume_from_checkpoint": "Run the same command again to resume.",
    "load_best_model_at_end": "It keeps only one adapter of a stack.",
    "save_only_model": "Resuming a run needs the optimizer state.",
    "use_cpu": "Set `base.device: cpu`.",
    "model_init_kwargs": "Set `base`.",
    "trust_remote_code": "Set `base.trust_remote_code`.",
    "remove_unused_columns": "The data set type decides it.",
    "dataset_text_field": "Set the stage's `data`.",
    "dataset_kwargs": "Set the stage's `data`.",
    "chat_template_path": "Set `prompt.template`.",
    "eos_token": "It comes from the tokenizer.",
    "pad_token": "It comes from the tokenizer.",
    "do_train": "Every stage trains.",
    "do_eval": "Set the recipe's `evaluation`.",
    "do_predict": "Set the recipe's `evaluation`.",
    "local_rank": "The launcher sets it.",
    "parallelism_config": "A run uses one GPU.",
}
# Fields with a narrower annotation in the dataclass, because argument parsers accept only one type.
_WIDER: dict[str, Any] = {
    "activation_memory": str | float,
    "compile": bool | typing.Literal["auto"],
    "learning_rate": float | typing.Literal["auto"],
    "margin": float | typing.Literal["auto"],
    "max_tokens_per_batch": int | typing.Literal["auto"] | None,
}
_HUB = "Publish the finished run with `push` instead; a stage is not pushed while it trains."


@dataclass(frozen=True)
class TrainField:
    """One field of a trainer configuration.

    Args:
        name: Its key in `train`.
        annotation: Its type.
        default: Its default; None also for a default factory.
        help: Its `metadata["help"]`.
        choices: The valid texts; empty if any text is valid.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    choices: tuple[str, ...]


@cache
def train_fields(stage_type: StageType) -> dict[str, TrainField]:
    """The fields of `train` in a stage of this type, by name. Imports trl or the trainer, and with them torch."""
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
    """`(key, what, fix)` for every key of `train` that is unknown, is set elsewhere, or has an invalid value."""
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
    """What to set instead of a field that `train` does not accept; None for all other fields."""
    return _HUB if key == "push_to_hub" or key.startswith("hub_") else SET_ELSEWHERE.get(key)


def type_adapter(annotation: Any) -> TypeAdapter[Any]:
    """Pydantic's validator for a field's type; PydanticUserError if the type has its own pydantic configuration."""
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
        pass
    what = out_of_range(field.name, value)
    return (what, None) if what else None


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
