"""Writes `docs/recipe-reference.md`, the reference page of all recipe keys, from the JSON schema."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from tuna_peft.recipe.json_schema import RANKING_TRAIN, SFT_TRAIN, recipe_json_schema

_HEAD = """\
# Recipes, key by key

A recipe is one YAML file that describes a run. This page lists every key with its type, its default and its meaning.
Any other key is an error. `tuna-peft schema` prints the JSON schema, for completion in editors;
`tuna-peft schema --field lora.r` prints the help of one key. On the command line, a key has dots and stage names:
`stages.contextual.train.margin=0.2`.

This page is generated: `tuna-peft schema --markdown > docs/recipe-reference.md`.
"""

_TRAIN = """\
These fields are specific to tuna_peft or have another default here. All fields of
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) are accepted as well.
"""

_SFT = """\
The fields of [`trl.SFTConfig`](https://huggingface.co/docs/trl/sft_trainer), with its defaults.
"""


def recipe_reference() -> str:
    """The page in Markdown. Imports torch, because the fields of `train` come from the trainers' configurations."""
    schema = recipe_json_schema()
    titles = _titles(schema)
    parts = [_HEAD]
    for name, title in titles.items():
        definition = schema["$defs"][name] if name else schema
        parts.append(f"## {title}\n")
        if name == SFT_TRAIN:
            parts.append(_SFT)
            continue
        about = definition.get("description", "").partition("\n\n")[0]
        parts.append(_TRAIN if name == RANKING_TRAIN else " ".join(about.split()) + "\n")
        parts.append("| key | type | default | |\n|---|---|---|---|")
        required = definition.get("required", [])
        for key, node in definition["properties"].items():
            if name == RANKING_TRAIN and key not in _own_train_fields():
                continue
            default = "required" if key in required else _default(node)
            about = " ".join(node.get("description", "").split()).replace("|", "\\|")
            parts.append(f"| `{key}` | {_kind(node, titles)} | {default} | {about} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _own_train_fields() -> set[str]:
    from tuna_peft.training.config import TunaConfig

    return {field.name for field in dataclasses.fields(TunaConfig)} & set(TunaConfig.__annotations__)


def _titles(schema: dict[str, Any]) -> dict[str, str]:
    """The heading of each object, by the name of its definition ("" for the recipe), depth first, each once."""
    found: dict[str, str] = {}

    def visit(path: str, name: str) -> None:
        if name in found:
            return
        definition = schema["$defs"][name] if name else schema
        # A key may accept two kinds of object; the heading of the second one contains its first key.
        found[name] = f"{path}, with {next(iter(definition['properties']))}" if path in found.values() else path
        if name in (SFT_TRAIN, RANKING_TRAIN):
            return
        for key, node in definition.get("properties", {}).items():
            inner = f"{path}.{key}".lstrip(".")
            for target in _references(node):
                visit(inner, target)
            if key == "train" and path == "stages":
                visit(f"{inner}, type ranking", RANKING_TRAIN)
                visit(f"{inner}, type sft", SFT_TRAIN)

    visit("", "")
    return {**found, "": "The recipe"}


def _references(node: dict[str, Any]) -> Iterator[str]:
    if "$ref" in node:
        yield node["$ref"].rpartition("/")[2]
    inner = [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            inner.append(node[key])
    for part in inner:
        yield from _references(part)


def _anchor(title: str) -> str:
    """The anchor of a heading, the same in GitHub and Python-Markdown."""
    return re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-")


def _kind(node: dict[str, Any], titles: dict[str, str]) -> str:
    if "$ref" in node:
        title = titles[node["$ref"].rpartition("/")[2]]
        return f"[{title}](#{_anchor(title)})"
    if alternatives := node.get("anyOf") or node.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(part, titles) for part in alternatives))
    if "allOf" in node:
        return _kind(node["allOf"][0], titles)
    if "const" in node:
        return f"`{node['const']}`"
    if len(node.get("enum", ())) in range(1, 9):  # longer lists (transformers' schedulers) change between versions
        return ", ".join(f"`{value}`" for value in node["enum"])
    kind = node.get("type", "any")
    if kind == "array":
        return f"list of {_kind(node.get('items', {}), titles)}"
    if kind == "object" and isinstance(node.get("additionalProperties"), dict):
        return f"by name: {_kind(node['additionalProperties'], titles)}"
    return {"object": "fields", "null": "null"}.get(kind, kind)


def _default(node: dict[str, Any]) -> str:
    if "default" not in node or isinstance(node["default"], dict | list):
        return ""
    return f"`{json.dumps(node['default'])}`"
