"""A stage that samples by a server: the run exports its model, waits for a server of it, and samples."""

from __future__ import annotations

import json
import logging

import pytest
from huggingface_hub import constants
from pydantic import ValidationError
from scripted_server import Answer, error, scripted_server
from test_pipeline import files  # noqa: F401 - a fixture
from test_rank_samples import SAMPLE, made, on_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuna_peft import UserError
from tuna_peft.models.generation.generate import stream_responses
from tuna_peft.recipe.feedback_schema import StageSample, StageServer
from tuna_peft.recipe.schema import BaseSettings
from tuna_peft.run import sample_server, serving
from tuna_peft.run.pipeline import run_recipe


class Engine:
    """Serves the model in a folder as vLLM does."""

    def __init__(self, folder):
        self.folder, self.loaded = folder, None

    def __call__(self, asked):
        body = asked.body
        if body["model"] != "tuna":
            return error(404, "no such model")
        if self.loaded is None:
            self.loaded = (
                AutoModelForCausalLM.from_pretrained(self.folder), AutoTokenizer.from_pretrained(self.folder)
            )  # fmt: skip
        model, tokenizer = self.loaded
        ids = tokenizer(body["prompt"])["input_ids"]
        [found] = stream_responses(
            model, tokenizer, [ids], n=body.get("n", 1), temperature=body["temperature"],
            max_new_tokens=body["max_tokens"], seed=body["seed"],
        )  # fmt: skip
        choices = [
            {"index": i, "text": text, "finish_reason": "stop" if ended else "length"}
            for i, (text, ended) in enumerate(zip(found.texts, found.ended, strict=True))
        ]
        return Answer(200, {"choices": choices})


def by_server(files, url, **more):  # noqa: F811
    server = {"base_url": url, "in_flight": 1, "max_retries": 0, **more}
    recipe = made(files, on_policy(files, sample={**SAMPLE, "server": server}))
    recipe.export.merge.dtype = "float32"
    return recipe


def test_the_run_exports_waits_samples_and_resumes_to_the_same_bytes(files, tmp_path, caplog, monkeypatch):  # noqa: F811
    folder = tmp_path / "run"
    engine = Engine(folder / "stages/contextual/served")
    monkeypatch.setattr(serving, "_PAUSE", 0.01)
    with scripted_server(engine) as server, caplog.at_level(logging.INFO, "tuna_peft"):
        report = run_recipe(by_server(files, server.url), folder)
        kept = (folder / "stages/contextual/samples.jsonl").read_bytes()
        asked = len(server.asked)
        (folder / "stages/contextual/feedback.json").unlink()  # as if it had been interrupted after the last sample
        (folder / "stages/contextual/done.json").unlink()
        run_recipe(by_server(files, server.url), folder)
        assert len(server.asked) == asked and (folder / "stages/contextual/samples.jsonl").read_bytes() == kept
    assert report["data"]["contextual"]["sample"]["kept"] > 0
    assert f"vllm serve {folder}/stages/contextual/served --served-model-name tuna" in caplog.text
    assert "4 of 4 greedy answers of the server are those of the adapters" in caplog.text
    served = json.loads((folder / "stages/contextual/served/generation_config.json").read_text())
    assert served["do_sample"] and served["top_k"] == 0 and served["eos_token_id"] == 2
    entries = (folder / "stages/contextual/samples.journal.jsonl").read_text().splitlines()
    keys = {tuple(sorted(json.loads(line)["value"])) for line in entries[1:]}
    assert keys == {("ended", "lengths", "texts")}


def test_a_server_of_another_model_is_not_sampled_from(files, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(serving, "_PAUSE", 0.01)

    def another(asked):
        return Answer(200, {"choices": [{"index": 0, "text": "no such words", "finish_reason": "stop"}]})

    with scripted_server(another) as server, pytest.raises(UserError) as caught:
        run_recipe(by_server(files, server.url, wait_minutes=1e-9), tmp_path / "run")
    assert "it serves another model" in str(caught.value) and "vllm serve" in str(caught.value)
    assert len(server.asked) > 0 and {"n" in asked.body for asked in server.asked} == {False}


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp", "transformers"])
def test_the_recipe_in_the_run_folder_can_be_read_again(engine):
    settings = StageSample.model_validate({"server": {"base_url": "http://localhost:8000/v1", "engine": engine}})
    assert StageSample.model_validate(settings.model_dump()) == settings


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"engine": "llama.cpp", "export": "combined"}, "needs `export: merged`"),
        ({"wait_minutes": 0}, "greater than 0"),
        ({"base_url": "host/v1"}, "not an address"),
    ],
)
def test_settings_that_cannot_work(server, message):
    with pytest.raises(ValidationError, match=message):
        StageSample.model_validate({"server": {"base_url": "http://localhost:8000/v1", **server}})


def test_a_base_from_the_hub_is_named_unless_an_engine_needs_its_files(tmp_path, monkeypatch):
    cached = tmp_path / "models--owner--name"
    (cached / "snapshots/abc").mkdir(parents=True)
    (cached / "snapshots/abc/config.json").write_text("{}")
    (cached / "refs").mkdir()
    for name in ("main", "v2"):
        (cached / "refs" / name).write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    base, folder = BaseSettings(model="owner/name"), str(cached / "snapshots/abc")

    def named(base, engine):
        return sample_server._base(base, StageServer(base_url="http://localhost:8000/v1", engine=engine))

    assert named(base, "vllm") == named(base, "transformers") == "owner/name"
    assert named(base, "llama.cpp") == folder
    assert named(base.model_copy(update={"revision": "v2"}), "vllm") == folder
    with pytest.raises(UserError, match="cannot find the base model 'owner/other'"):
        named(BaseSettings(model="owner/other"), "llama.cpp")
