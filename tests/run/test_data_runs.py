"""Whole runs on lists, patterns, compressed shards, mixtures and streamed data: the same rows give the same bytes."""

from __future__ import annotations

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from test_pipeline import TRAIN, Crash, _with
from tiny_llama import write_base

import tuna_peft.run.train_stage as train_stage_module
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.pipeline import run_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_base(tmp_path_factory.mktemp("data") / "base"))


@pytest.fixture
def train(base, tmp_path):
    def train(name, **data):
        stage = {"name": "rank", "type": "ranking", "data": data, "train": {**TRAIN, "save_steps": 1}}
        recipe = {
            "name": "data", "base": {"model": base, "device": "cpu"}, "prompt": {"template": "none"}, "lora": {"r": 2},
            "stages": [stage], "evaluation": None,
            "export": {"combine": False, "merge": {"enabled": False}, "divergence_prompts": 0},
        }  # fmt: skip
        report = run_recipe(Recipe.model_validate(recipe), tmp_path / name)
        return (tmp_path / name / "stack" / "rank" / "adapter_model.safetensors").read_bytes(), report

    return train


def row(number):
    # The same ids whatever the file is called: they are a part of no prompt, and named for reading alone.
    return {"id": str(number), "prompt": f"w{number + 10} ", "completions": ["w5 w6", "w7"], "scores": [1, 0]}


def write(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(map(row, numbers))), path)
    else:
        with pyarrow.output_stream(str(path), compression="detect") as stream:
            stream.write("".join(json.dumps(row(number)) + "\n" for number in numbers).encode())
    return str(path)


def test_a_mixture_of_shards_is_the_file_that_it_amounts_to(train, tmp_path):
    for index, name in enumerate(("a.jsonl.zst", "b.jsonl.gz")):
        write(tmp_path / "shards" / name, range(index * 6, index * 6 + 6))
    other = write(tmp_path / "other.parquet", range(20, 24))
    mixed = [0, 1, 2, 20, 3, 4, 5, 21, 6, 7, 8, 22, 9, 10, 11, 23]  # three to one
    whole = write(tmp_path / "whole.jsonl", mixed)
    expected, _ = train("whole", path=whole)
    found, report = train("mixed", path=[f"{tmp_path}/shards/*", other], weights=[3, 1])
    assert report["data"]["rank"]["kept"] == 16
    assert found == expected
    assert train("listed", path=[f"{tmp_path}/shards/*", other])[0] != expected  # the order is another


def test_a_streamed_run_resumes_without_the_hub(train, tmp_path, monkeypatch):
    for index in range(2):
        write(tmp_path / "hub" / f"{index}.parquet", range(index * 10, index * 10 + 10))
    real = datasets.load_dataset

    def load_dataset(path, name, *, revision, **options):
        return real("parquet", data_files=str(tmp_path / "hub" / "*.parquet"), **options)

    def offline(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    streamed = {"path": "owner/huge", "streaming": True, "limit": 16}
    expected, _ = train("local", path=write(tmp_path / "local.jsonl", range(16)))
    crash, trainer = Crash(2), train_stage_module._trainer
    with monkeypatch.context() as patch:
        patch.setattr(train_stage_module, "_trainer", lambda *args: _with(trainer(*args), crash))
        with pytest.raises(RuntimeError, match="crash"):
            train("streamed", **streamed)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    found, report = train("streamed", **streamed)
    assert report["stages"]["rank"]["resumed_from"] and found == expected
