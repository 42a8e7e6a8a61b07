"""Normalised records as data sets of `datasets`. Used by `load` and `convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuna_peft.data.ranked import Record

if TYPE_CHECKING:
    import datasets


def ranked_dataset(records: list[Record]) -> datasets.Dataset:
    """Normalised records as a data set, with the same column types whatever the records hold."""
    import datasets

    text = datasets.Value("string")
    responses = [response for record in records for response in record["completions"]]
    features = {
        "id": text,
        "prompt": _part([record["prompt"] for record in records]),
        "completions": datasets.List(_part(responses)),
        "scores": datasets.List(datasets.Value("float64")),
        "ranks": datasets.List(datasets.Value("int64")),
        "reference": _part([record["reference"] for record in records]),
    }
    if any("tools" in record for record in records):
        features["tools"] = datasets.Json()
    table = {name: [record.get(name) for record in records] for name in features}
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


def supervised_dataset(records: list[Record]) -> datasets.Dataset:
    """The best response of each record, in TRL's prompt-completion type."""
    import datasets

    completions: list[Any] = [record["completions"][0] for record in records]
    if isinstance(records[0]["prompt"], list):
        completions = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in completions]
    table = {
        "id": [record["id"] for record in records],
        "prompt": [record["prompt"] for record in records],
        "completion": completions,
    }
    features = {"id": datasets.Value("string")} | {key: _part(table[key]) for key in ("prompt", "completion")}
    if any("tools" in record for record in records):
        table["tools"], features["tools"] = [record.get("tools") for record in records], datasets.Json()
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


def _part(values: list[Any]) -> Any:
    """The column type of prompts or responses: text, plain messages as in TRL, or JSON where there is more in them."""
    import datasets

    text = datasets.Value("string")
    if not any(isinstance(value, list) for value in values):
        return text
    plain = all(
        isinstance(value, list) and all(message.keys() == {"role", "content"} for message in value) for value in values
    )
    return datasets.List({"role": text, "content": text}) if plain else datasets.Json()
