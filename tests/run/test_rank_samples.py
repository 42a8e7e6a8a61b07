"""Recipes whose responses the run ranks itself: what they write and reject, and that nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError
from test_pipeline import files, recipe  # noqa: F401 - files is a fixture

import tuna_peft.run.train_stage as train_stage_module
from tuna_peft import AdapterStack, UserError
from tuna_peft.data.config import DataSource, PromptConfig
from tuna_peft.data.load import load_ranked
from tuna_peft.data.texts import prompt_ids
from tuna_peft.feedback import local_model
from tuna_peft.models.generation.generate import stream_responses
from tuna_peft.models.stack.adapters import adapter_names
from tuna_peft.recipe.dump import dump_recipe
from tuna_peft.recipe.load import load_recipe
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run import rank_samples
from tuna_peft.run.pipeline import run_recipe

SAMPLE = {"n": 3, "max_new_tokens": 5, "batch_size": 6, "trials": 2, "max_similarity": 0.5}


def by_words(record, response):
    """A grader for the tests: how many different words?"""
    return float(len(set(response.split())))


def made(files, contextual, *, below=1):  # noqa: F811
    """The tests' recipe with other data for its last stage and `below` stages below it, and no more than that."""
    stages = [stage.model_dump() for stage in recipe(files).stages][2 - below :]
    stages[-1] |= contextual
    for stage in stages:
        stage["train"] = {**stage["train"], "max_steps": 2}
    export = {"combine": False, "merge": {"enabled": False}, "divergence_prompts": 0}
    return recipe(files, stages=stages, evaluation=None, export=export)


def on_policy(files, **more):  # noqa: F811
    prompts = {"path": str(files / "ranked.jsonl"), "limit": 12}
    data = {"prompts": prompts, "sample": SAMPLE, "judge": {"function": "test_rank_samples:by_words"}}
    return {"data": {**data, **more}}


def adapter(run):
    return (run / "stack/contextual/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, run_recipe(made(files, on_policy(files)), folder)


def test_supervised_fine_tuning_on_the_best_of_its_own_samples(files, tmp_path, monkeypatch):  # noqa: F811
    """RAFT, in two rounds: each trains on the first response of each list, with the weights on it alone."""
    seen, real = [], train_stage_module._trainer

    def spy(model, config, tokenizer, rows, *args):
        seen.append({tokenizer.decode(row["input_ids"]) for row in rows})
        return real(model, config, tokenizer, rows, *args)

    monkeypatch.setattr(train_stage_module, "_trainer", spy)
    report = run_recipe(made(files, {**on_policy(files), "type": "sft", "rounds": 2}, below=0), tmp_path / "run")
    assert list(report["stages"]) == ["contextual-1", "contextual-2"] and len(seen) == 2
    for number, texts in enumerate(seen, start=1):
        file = tmp_path / f"run/stages/contextual-{number}/ranked.jsonl"
        ranked, _ = load_ranked(DataSource(path=str(file)), PromptConfig())
        assert report["data"][f"contextual-{number}"]["training"]["tokens"]["kept"] == len(ranked) == len(texts) > 0
        for row in ranked:
            best, *others = row["completions"]
            assert any(text.startswith(row["prompt"] + best) for text in texts)
            assert not any(text.startswith(row["prompt"] + other) for text in texts for other in others)


def test_the_stage_learns_from_ranked_samples_of_the_stage_below(straight, files):  # noqa: F811
    folder, report = straight
    counts = report["data"]["contextual"]
    assert counts["prompts"]["kept"] == counts["sample"]["prompts"] == 12
    assert counts["judge"]["rows"] == counts["sample"]["kept"]
    assert counts["judge"]["ranked"] == counts["training"]["tokens"]["kept"] > 0
    assert counts["judge"]["ranked"] + sum(counts["judge"]["left_out"].values()) == counts["judge"]["rows"]
    assert report["stages"]["contextual"]["steps"] == 2
    stage = folder / "stages" / "contextual"
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    ranked, _ = load_ranked(DataSource(path=str(stage / "ranked.jsonl")), PromptConfig())
    for row in ranked:
        assert row["scores"] == [by_words({}, text) for text in row["completions"]]
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert {row["id"] for row in ranked} <= {row["id"] for row in samples}
    # The samples are those of the stage below.
    below = AdapterStack.from_pretrained(folder / "stack", upto="probabilistic", device="cpu")
    journal = (stage / "samples.journal.jsonl").read_text().splitlines()
    ids = prompt_ids(samples[0]["prompt"], below.tokenizer)
    [drawn] = stream_responses(
        below.model, below.tokenizer, [ids], n=3, temperature=1.0, max_new_tokens=5, seed="0/contextual/0"
    )
    assert drawn.texts in [json.loads(line)["value"]["texts"] for line in journal[1:]]


def test_a_finished_run_asks_nothing_again(straight, files, monkeypatch):  # noqa: F811
    folder, report = straight
    for name in ("sample_candidates", "Judging"):
        monkeypatch.setattr(rank_samples, name, lambda *args, **options: pytest.fail("done again"))
    assert run_recipe(made(files, on_policy(files)), folder) == report


@pytest.mark.parametrize("stop", ["sample", "verdict"])
def test_an_interrupted_run_resumes_to_the_same_bytes(straight, files, tmp_path, monkeypatch, stop):  # noqa: F811
    real, counted = rank_samples.Journal.add, {"samples.journal.jsonl": 0, "ranking.journal.jsonl": 0}
    name = "samples.journal.jsonl" if stop == "sample" else "ranking.journal.jsonl"

    def add(self, key, value):
        if self.path.name in counted:
            counted[self.path.name] += 1
            if counted[name] == 5:
                raise RuntimeError("crash")
        real(self, key, value)

    monkeypatch.setattr(rank_samples.Journal, "add", add)
    with pytest.raises(RuntimeError, match="crash"):
        run_recipe(made(files, on_policy(files)), tmp_path / "run")
    monkeypatch.setattr(rank_samples.Journal, "add", real)
    report = run_recipe(made(files, on_policy(files)), tmp_path / "run")
    for file in ("samples.jsonl", "ranked.jsonl"):
        again = (tmp_path / "run/stages/contextual" / file).read_bytes()
        assert again == (straight[0] / "stages/contextual" / file).read_bytes()
    assert adapter(tmp_path / "run") == adapter(straight[0])
    kept = [{**one["data"]["contextual"]["judge"], "found": 0, "asked": 0} for one in (report, straight[1])]
    assert kept[0] == kept[1]


def test_samples_of_the_base_scored_by_a_teacher(files, tmp_path):  # noqa: F811
    score = {"model": str(files / "base"), "length_penalty": 0.5}
    source = on_policy(files, sample={**SAMPLE, "from": "base"}, judge=None, score=score)
    report = run_recipe(made(files, source, below=0), tmp_path / "run")
    counts = report["data"]["contextual"]
    assert counts["score"]["scored"] == counts["training"]["tokens"]["kept"] > 0
    line = (tmp_path / "run/stages/contextual/ranked.jsonl").read_text().splitlines()[0]
    row = json.loads(line)
    assert row["length_penalty"] == 0.5 and row["teacher"]["model"] == str(files / "base")


def test_responses_of_a_file_are_judged_without_sampling(files, tmp_path):  # noqa: F811
    source = on_policy(files, sample=None)
    report = run_recipe(made(files, source, below=0), tmp_path / "run")
    counts = report["data"]["contextual"]
    assert "sample" not in counts and counts["judge"]["ranked"] > 0


@pytest.mark.parametrize("who", ["judge", "score"])
def test_judge_and_teacher_are_loaded_on_the_device_of_the_recipe(files, tmp_path, monkeypatch, who):  # noqa: F811
    asked = []

    def load_any_model(model, *, device, **options):
        asked.append((model, device))
        raise UserError("seen enough")

    monkeypatch.setattr(local_model, "load_any_model", load_any_model)
    source = {"prompts": {"path": str(files / "ranked.jsonl"), "limit": 2}, who: {"model": str(files / "base")}}
    with pytest.raises(UserError, match="seen enough"):
        run_recipe(made(files, {"data": source}, below=0), tmp_path / "run")
    assert asked == [(str(files / "base"), "cpu")]


def test_rounds_sample_from_one_another(files, tmp_path, monkeypatch):  # noqa: F811
    source, sampled_from = on_policy(files, sample={**SAMPLE, "from": "base"}), []
    real = rank_samples.sample_candidates

    def spy(sampler, *args, **options):
        sampled_from.append((list(sampler.identity["adapters"]), options["seed"]))
        return real(sampler, *args, **options)

    monkeypatch.setattr(rank_samples, "sample_candidates", spy)
    report = run_recipe(made(files, {**source, "rounds": 2}), tmp_path / "run")
    assert list(report["stages"]) == ["probabilistic", "contextual-1", "contextual-2"]
    assert sampled_from == [([], "0/contextual-1"), (["probabilistic", "contextual-1"], "0/contextual-2")]
    loaded = AdapterStack.from_pretrained(tmp_path / "run", device="cpu")
    assert adapter_names(loaded.model) == ["probabilistic", "contextual-1", "contextual-2"]
    one, two = ((tmp_path / f"run/stages/contextual-{i}/ranked.jsonl").read_bytes() for i in (1, 2))
    assert one != two


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": None}, "`prompts` need exactly one of `score` (a teacher) and `judge`"),
        ({"score": {"model": "x"}}, "`prompts` need exactly one of `score` (a teacher) and `judge`"),
        ({"judge": {}}, "give one of `server`, `model` and `function`, not none"),
        ({"sample": {**SAMPLE, "from": "later"}}, "`contextual` samples from `later`, which is not an earlier stage"),
        (
            {"judge": None, "score": {"server": {"base_url": "http://x/v1", "model": "m"}, "generate": {}}},
            "`sample` has no effect with `score.generate`",
        ),
        ({"sample": {"temperature": 0}}, "greater than 0"),
        ({"sample": {"n": 1}}, "greater than or equal to 2"),
    ],
)
def test_conflicting_settings_are_rejected(files, changes, message):  # noqa: F811
    with pytest.raises(ValidationError) as error:
        made(files, on_policy(files, **changes))
    assert message in str(error.value)


def test_stages_that_cannot_rank_samples(files):  # noqa: F811
    with pytest.raises(ValidationError, match="`rounds` repeats sampling, so its `data` needs `sample`"):
        made(files, {"rounds": 2})
    taken = [stage.model_dump() for stage in made(files, {**on_policy(files), "rounds": 2}).stages]
    taken[0]["name"] = "contextual-2"
    with pytest.raises(ValidationError, match="named after its stage, with a number; given twice: contextual-2"):
        recipe(files, stages=taken)
    one = made(files, {**on_policy(files), "rounds": 2, "continue_adapter": True}).stages[-1].model_dump()
    last = {**one, **on_policy(files, sample={**SAMPLE, "from": "contextual-1"}), "name": "last"}
    with pytest.raises(ValidationError, match=r"`contextual-1`, which is not an earlier stage \(base, contextual-2\)"):
        recipe(files, stages=[one, last])


def test_samples_that_would_not_fit_and_a_missing_judge_stop_before_training(files, tmp_path):  # noqa: F811
    wide = on_policy(files, sample={**SAMPLE, "max_new_tokens": 1024})
    with pytest.raises(
        UserError, match=r"stages.contextual: prompts of up to \d+ tokens with responses of up to 1024"
    ):
        run_recipe(made(files, wide), tmp_path / "wide")
    absent = on_policy(files, judge={"function": "test_rank_samples:absent"})
    with pytest.raises(UserError, match="no grader 'test_rank_samples:absent'"):
        run_recipe(made(files, absent), tmp_path / "absent")
    assert not list((tmp_path / "absent" / "stages").rglob("checkpoint-*"))


RECIPE = """\
name: small
base: {model: "builtin:pico-llama"}
stages:
  - name: contextual
    type: ranking
    data:
      prompts: {path: "builtin:pico-llama/prompts.jsonl", limit: 4}
      sample:
        form: base
        n: 3
      judge: {function: "builtin:pico"}
    train: {max_steps: 1, max_length: 256}
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "r.yaml").write_text(text)
        return tmp_path / "r.yaml"

    return write


def test_errors_name_the_line_and_the_nearest_key(written):
    with pytest.raises(UserError, match=r"r.yaml:9: stages.contextual.data.sample.form: unknown key.\n.*`from`"):
        load_recipe(written(RECIPE))
    with pytest.raises(UserError, match=r"data.limit: unknown key.\n.*Valid here: prompts, sample, score, judge"):
        load_recipe(written(RECIPE.replace("form", "from")), ["stages.contextual.data.limit=3"])
    with pytest.raises(UserError, match=r"r.yaml:7: stages.contextual.data.prompts.path: this key is required"):
        load_recipe(written(RECIPE.replace('path: "builtin:pico-llama/prompts.jsonl", ', "").replace("form", "from")))
    with pytest.raises(UserError, match=r"r.yaml:10: stages.contextual.data.sample.n: expected an integer, found 'x'"):
        load_recipe(written(RECIPE.replace("form", "from").replace("n: 3", "n: x")))
    with pytest.raises(UserError, match=r"r.yaml:7: .*prompts.path: there is no file or folder '\./absent.jsonl'"):
        load_recipe(
            written(RECIPE.replace("builtin:pico-llama/prompts.jsonl", "./absent.jsonl").replace("form", "from"))
        )


def test_a_recipe_survives_being_written_out(written):
    loaded = load_recipe(written(RECIPE.replace("form", "from")), ["stages.contextual.rounds=2"])
    assert "from: base" in dump_recipe(loaded)
    again = load_recipe(written(dump_recipe(loaded)))
    assert again == loaded and isinstance(again, Recipe)


def test_dry_run_and_inspect(written):
    from typer.testing import CliRunner

    from tuna_peft.cli.app import app

    file = written(RECIPE.replace("form", "from"))
    overrides = ["stages.contextual.data.sample.max_new_tokens=64"]
    shown = CliRunner().invoke(app, ["run", str(file), "--dry-run", *overrides])
    assert shown.exit_code == 0, shown.stderr
    assert "prompts.jsonl: 4 rows" in shown.stdout and "ranked by the judge builtin:pico" in shown.stdout
    assert "samples 3 responses per prompt from base, at temperature 1, in 3 attempts at most" in shown.stdout
    assert "the best response" not in shown.stdout
    shown = CliRunner().invoke(app, ["run", str(file), "--dry-run", *overrides, "stages.contextual.type=sft"])
    assert "trains on the best response of each list" in shown.stdout
    inspected = CliRunner().invoke(app, ["data", "inspect", str(file), "--n", "2"])
    assert inspected.exit_code == 0, inspected.stderr
    assert "4 prompts; their responses are generated during the run" in " ".join(inspected.stdout.split())


@pytest.mark.slow
def test_kill_9_while_sampling_judging_and_training(straight, files, tmp_path):  # noqa: F811
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(made(files, on_policy(files))))
    command = [sys.executable, "-m", "tuna_peft", "run", str(file), "--output", str(tmp_path / "run")]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    for kills in range(6):
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
        journal = tmp_path / "run/stages/contextual/samples.journal.jsonl"
        before = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None:
            time.sleep(0.005)
            grown = journal.exists() and journal.stat().st_size > before
            if grown and kills < 5:  # it has just saved some more samples
                process.send_signal(signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert process.returncode == 0
    assert adapter(tmp_path / "run") == adapter(straight[0])
