"""Exports of a run as GGUF and to the Hub: checked before anything is trained, done after everything else."""

from __future__ import annotations

import json

import pytest
from hub_server import client_of_its_own
from llama_family import write_model
from tiny_llama import write_base

from tuna_peft.errors import UserError
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.pipeline import run_recipe

TRAIN = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "max_length": 200, "report_to": []}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with client_of_its_own(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("base"), "llama-tied"))


def recipe(base, folder, **export):
    data = folder / "sft.json"
    data.write_text(json.dumps([{"instruction": "the cat", "input": "", "output": "sat on the mat"}] * 4))
    return Recipe.model_validate(
        {
            "name": "small",
            "base": {"model": base, "device": "cpu"},
            "quantization": {"method": "none"},
            "stages": [{"name": "sft", "type": "sft", "data": {"path": str(data)}, "train": TRAIN}],
            "export": {"divergence_prompts": 2, **export},
        }
    )


def test_a_run_writes_gguf_and_publishes_once(hub, base, tmp_path):
    push = {"repo": "me/small", "base_id": "someone/base", "data_license": "CC0"}
    settings = recipe(base, tmp_path, gguf=["q8_0", "f16"], push=push)
    hub.faults["commit"] = [503]
    with pytest.raises(UserError, match="the run is complete, but was not published: the Hub has a server error"):
        run_recipe(settings, tmp_path / "run")
    assert (tmp_path / "run" / "report.json").is_file()
    assert (tmp_path / "run" / "gguf" / "small-Q8_0.gguf").is_file()
    exports = json.loads((tmp_path / "run" / "report.json").read_text())["exports"]
    measured = {name: exports[f"gguf/small-{name}.gguf"]["divergence"]["kl_mean"] for name in ("Q8_0", "F16")}
    assert measured["F16"] < measured["Q8_0"]
    run_recipe(settings, tmp_path / "run")
    files = hub.repositories["me/small"].files()
    assert {"stack/stack.json", "stack/sft/adapter_model.safetensors", "adapter_model.safetensors"} <= set(files)
    assert {"training/recipe.yaml", "training/sft.png"} <= set(files)
    for content in files.values():
        assert str(tmp_path).encode() not in content
        assert base.encode() not in content
    card = files["README.md"].decode()
    for part in ("base_model: someone/base", "## Hardware and time", "`sft.json`", "CC0", "## Training curves"):
        assert part in card
    hub.requests.clear()
    run_recipe(settings, tmp_path / "run")
    assert not hub.requests


def test_gguf_files_of_a_run_are_made_from_the_nearer_base(base, tmp_path):
    settings = recipe(base, tmp_path, gguf=["q4_0"], gguf_base="auto")
    settings.quantization.method = "nf4"
    report = run_recipe(settings, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "gguf" / "tuna_export.json").read_text())
    assert record["base"].keys() == {"small-Q4_0.gguf"}
    measured = {name: export["divergence"]["kl_mean"] for name, export in report["exports"].items() if name != "gguf"}
    assert measured.keys() == {
        "base without adapters", "combined", "combined on the unquantized base", "merged", "gguf/small-Q4_0.gguf",
    }  # fmt: skip
    assert measured["combined"] <= 1e-10 < measured["combined on the unquantized base"]


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ({"push": {"repo": "me/x"}}, "the adapters' base is a folder of this machine.*\n.*export.push.base_id"),
        ({"push": {"repo": "me/x", "base_id": "someone/base"}}, "no token for the Hub"),
        ({"gguf": ["q8_0"]}, "llama.cpp cannot repeat this tokenizer: its model is WordLevel"),
    ],
)
def test_what_would_fail_at_the_end_fails_before_training(hub, tmp_path, monkeypatch, export, message):
    if "token" in message:
        monkeypatch.delenv("HF_TOKEN")
    settings = recipe(write_base(tmp_path / "base"), tmp_path, **export)
    with pytest.raises(UserError, match=message):
        run_recipe(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "stack").exists()


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ({"gguf": ["q8_0"], "merge": {"enabled": False}}, "needs `merge` enabled"),
        ({"gguf_base": "auto"}, "needs types in `gguf`"),
        ({"gguf": ["q8_0"], "gguf_base": "auto", "divergence_prompts": 0}, "`divergence_prompts` to measure on"),
        ({"gguf": ["q4_k_m"]}, "'q4_0'"),
        ({"push": {"repo": "me/x", "what": "gguf"}}, "needs types in `gguf`"),
        ({"push": {"repo": "me/x", "what": "merged"}, "merge": {"enabled": False}}, "needs `merge` enabled"),
        ({"push": {"repo": "/tmp/x"}}, "String should match pattern"),
    ],
)
def test_conflicting_settings_are_rejected(tmp_path, export, message):
    with pytest.raises(ValueError, match=message):
        recipe("builtin:pico-llama", tmp_path, **export)
