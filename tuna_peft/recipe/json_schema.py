"""The JSON schema of recipes, for editors and for `tuna-peft schema`, with the trainers' fields and their help."""

from __future__ import annotations

import json
from typing import Any

from pydantic import PydanticUserError
from pydantic.errors import PydanticInvalidForJsonSchema

from tuna_peft.errors import UserError, did_you_mean
from tuna_peft.recipe.layers import EXTENDS, EXTENDS_HELP
from tuna_peft.recipe.schema import Recipe, StageType
from tuna_peft.recipe.train_fields import TrainField, train_fields, type_adapter

# The definitions of `train`, by the type of its stage.
SFT_TRAIN, RANKING_TRAIN = "SFTTrain", "RankingTrain"
_TRAIN: dict[StageType, str] = {"sft": SFT_TRAIN, "ranking": RANKING_TRAIN}


def recipe_json_schema() -> dict[str, Any]:
    """JSON schema, draft 2020-12; the fields of `train` depend on the stage's `type`. Imports torch."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"][EXTENDS] = {"type": "string", "description": EXTENDS_HELP}
    stage = schema["$defs"]["Stage"]
    stage["allOf"] = []
    for stage_type, definition in _TRAIN.items():
        fields = train_fields(stage_type)
        schema["$defs"][definition] = {
            "type": "object",
            "description": stage["properties"]["train"]["description"],
            "properties": {name: _field_schema(field, schema["$defs"]) for name, field in fields.items()},
            "additionalProperties": False,
        }
        stage["allOf"].append(
            {
                "if": {"properties": {"type": {"const": stage_type}}},
                "then": {"properties": {"train": {"$ref": f"#/$defs/{definition}"}}},
            }
        )
    return schema


def field_help(dotted: str) -> str:
    """The help of a key, such as `lora.r`, `stages.train.margin` or, with a stage name, `stages.sft.train.max_steps`.

    Raises:
        UserError: There is no such key; the message names the most similar one.
    """
    schema = recipe_json_schema()
    nodes, keys, above = {"": schema}, dotted.split("."), ""  # `train` has two schemas, one for each type of stage
    while keys:
        key = keys.pop(0)
        described = {
            kind: node["properties"][key] for kind, node in nodes.items() if key in node.get("properties", {})
        }
        if not described and above == "stages" and keys:
            above = key  # `stages.sft.train...`: the stage's name or type
            continue
        if not described:
            valid = dict.fromkeys(name for node in nodes.values() for name in node.get("properties", {}))
            raise UserError(f"a recipe has no key `{dotted}`", fix=did_you_mean(key, valid))
        if key == "train":
            wanted = {kind: name for kind, name in _TRAIN.items() if above not in _TRAIN or kind == above}
            nodes = {f", in a stage of type {kind}": schema["$defs"][name] for kind, name in wanted.items()}
        else:
            nodes = {}
            for kind, node in described.items():
                targets = _targets(node, schema)
                for target in targets:
                    nodes[f"{kind}, as {target['title']}" if len(targets) > 1 else kind] = target
        above = key
    lines = [_described(dotted + kind, node) for kind, node in described.items()]
    for kind, node in nodes.items():
        if "properties" in node:
            lines.append(f"Keys{kind}: {', '.join(node['properties'])}")
    return "\n".join(lines)


def _field_schema(field: TrainField, definitions: dict[str, Any]) -> dict[str, Any]:
    try:
        schema = type_adapter(field.annotation).json_schema()
    except (PydanticUserError, PydanticInvalidForJsonSchema):
        schema = {}
    definitions.update(schema.pop("$defs", {}))
    if field.choices:
        schema = {"enum": list(field.choices)}
    schema["description"] = field.help
    if field.default is None or isinstance(field.default, bool | int | float | str):
        schema["default"] = field.default
    return schema


def _targets(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The object schemas that a property refers to, through `$ref`, unions and lists; none for a plain value."""
    if "$ref" in node:
        return [schema["$defs"][node["$ref"].rpartition("/")[2]]]
    inner = [*node.get("anyOf", ()), *node.get("oneOf", ()), *([node["items"]] if "items" in node else [])]
    return [target for part in inner for target in _targets(part, schema)]


def _described(title: str, node: dict[str, Any]) -> str:
    kinds = []
    for part in node.get("anyOf", [node]):
        values = part.get("enum") or ([part["const"]] if "const" in part else [part.get("type", "")])
        kinds += [str(value) for value in values if value]
    kind = " | ".join(kinds)
    default = f", default {json.dumps(node['default'])}" if "default" in node else ""
    return f"{title}{f' ({kind}{default})' if kind else ''}\n  {node.get('description', '')}"
