"""Reads an entry of LLaMA-Factory's `dataset_info.json`: its file and its columns. Used by `load`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuna_peft.data.config import Columns, DataSource
from tuna_peft.data.json_files import read_text
from tuna_peft.errors import UserError, did_you_mean

_NAME = "dataset_info.json"


def resolve_entry(source: DataSource) -> DataSource:
    """The source that an entry describes; any other source unchanged.

    Args:
        source: With `path: .../dataset_info.json` and the entry as `name`.

    Raises:
        UserError: There is no such entry, or it is of a kind that cannot be read here.
    """
    path = Path(source.path).expanduser() if isinstance(source.path, str) else None
    if path is None or path.name != _NAME or not path.is_file():
        return source
    try:
        entries = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error}", where=str(path)) from None
    if source.name is None or source.name not in entries:
        raise UserError(
            f"there is no entry {source.name!r}" if source.name else "which entry is meant?",
            where=str(path),
            fix=f"Write the entry as `name`. {did_you_mean(source.name or '', entries)}",
        )
    entry = entries[source.name]
    update: dict[str, Any] = {"name": entry.get("subset")}
    if "file_name" in entry:
        update["path"] = str(path.parent / entry["file_name"])
    elif "hf_hub_url" in entry:
        update["path"] = entry["hf_hub_url"]
        update["split"] = entry.get("split", source.split) if source.split == "train" else source.split
    else:
        raise UserError(
            f"the entry `{source.name}` has neither `file_name` nor `hf_hub_url`, but {', '.join(entry)}",
            where=str(path),
            fix="Download it, and give its file as `path`.",
        )
    if source.columns is None and source.format == "auto":
        if entry.get("formatting") == "sharegpt" and _is_plain(entry):
            update["format"] = "messages"
        else:
            update["columns"] = _columns(entry)
            if "kto_tag" in entry.get("columns", {}):
                update["group_by"] = source.group_by or update["columns"].instruction
    return source.model_copy(update=update)


def _is_plain(entry: dict[str, Any]) -> bool:
    """Whether the records are whole conversations in a usual spelling, to learn from as they are."""
    named, content = entry.get("columns", {}), entry.get("tags", {}).get("content_tag", "value")
    usual = named.get("messages", "conversations") in ("messages", "conversations") and content in ("value", "content")
    return usual and not entry.get("ranking") and "kto_tag" not in named


def _columns(entry: dict[str, Any]) -> Columns:
    named = entry.get("columns", {})
    if entry.get("formatting", "alpaca") == "sharegpt":
        prompt: dict[str, Any] = {"prompt": named.get("messages", "conversations")}
        content = "." + entry.get("tags", {}).get("content_tag", "value")
        if "kto_tag" in named:  # whole dialogues with a label each, collected by their first message
            first = {"instruction": f"{prompt['prompt']}[0]{content}"}
            whole = {"completions": [prompt["prompt"]], "scores": [named["kto_tag"]]}
            return Columns.model_validate(first | whole)
        if not entry.get("ranking"):
            raise UserError(
                "a ShareGPT entry without `ranking: true` holds whole conversations",
                where=_NAME,
                fix="Give its file as `path`, and say which turns to use, for example `columns: {instruction: "
                f"conversations[0]{content}, completions: conversations[1]{content}}}`.",
            )
    else:
        prompt = {"instruction": named.get("prompt", "instruction")}
        if "query" in named or not named:
            prompt["input"] = named.get("query", "input")
        content = ""
        if "history" in named:
            raise UserError(
                "the entry has `history` (earlier turns), which would be lost",
                where=_NAME,
                fix="Write the turns as messages (`formatting: sharegpt`), or leave `history` out of its columns.",
            )
    if "system" in named:
        prompt["system"] = named["system"]
    if entry.get("ranking"):
        both = [named.get(key, key) + content for key in ("chosen", "rejected")]
        return Columns.model_validate({**prompt, "completions": both, "ranks": "best_first"})
    label = {"scores": named["kto_tag"]} if "kto_tag" in named else {}
    return Columns.model_validate({**prompt, "completions": named.get("response", "output"), **label})
