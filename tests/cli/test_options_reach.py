"""Every option of a command arrives at what does the work: spies in its place, each option at an unusual value.

The options that are made from settings are tested in test_settings_options.py, and what settings do in
tests/run/test_settings_reach.py.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from spies import spy
from typer.testing import CliRunner

from tuna_peft.cli.app import app

OUT = Path("out")
LOST = "--allow-lost-update"


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Runs a command with a spy for `module:function`, and returns the one call."""

    def run(target: str, *arguments: str):
        module, _, function = target.partition(":")
        calls = spy(monkeypatch, importlib.import_module(f"tuna_peft.{module}"), function)
        result = CliRunner().invoke(app, list(arguments))
        assert "error: Seen" in result.output, result.output
        [call] = calls
        return call

    monkeypatch.chdir(tmp_path)
    rows = [{"id": str(i), "prompt": f"p{i}", "completions": ["a", "bb"], "ranks": [0, 1]} for i in range(3)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture
def stack(monkeypatch):
    """A stack that is found where it is named, and prompts to compare on that show their data and base."""
    monkeypatch.setattr("tuna_peft.models.stack.find.find_stack", lambda name: f"found {name}")
    monkeypatch.setattr("tuna_peft.cli.divergence.comparison_prompts", lambda *args: [list(args)])


DATA = ("--format", "ranked", "--split", "train[:2]", "--template", "none", "--skip-bad-rows")


def source_of(call):
    source, prompt = call[0][:2]
    return source.path, source.format, source.split, source.on_bad_row, prompt.template


def test_what_is_read(called):
    expected = ("data.jsonl", "ranked", "train[:2]", "skip", "none")
    read = "data.load:load_candidates"
    assert source_of(called(read, "judge", "data.jsonl", "o.jsonl", "--function", "builtin:pico", *DATA)) == expected
    assert source_of(called(read, "score", "data.jsonl", "o.jsonl", "--model", "m", *DATA)) == expected
    annotated = "feedback.agreement:read_annotated_rows"
    arguments = ("judge", "data.jsonl", "--validate", "--function", "builtin:pico", *DATA)
    assert source_of(called(annotated, *arguments)) == expected
    call = called("data.convert:convert", "data", "convert", "data.jsonl", "o.parquet", *DATA, "--group-by", "q",
                  "--no-header")  # fmt: skip
    assert source_of(call) == expected
    assert (call[0][0].group_by, call[0][0].header, call[0][2]) == (["q"], False, Path("o.parquet"))


def test_judge(called):
    arguments = ("judge", "data.jsonl", "o.jsonl", "--model", "some/judge", "--again", "--device", "cuda:1")
    (rows, settings, journal), options = called("feedback.judge:Judging", *arguments)
    assert [row["id"] for row in rows] == ["0", "1", "2"] and settings.model == "some/judge"
    assert options == {"again": True, "device": "cuda:1"} and journal.path == Path("o.journal.jsonl")
    (_, _, journal), options = called("feedback.judge:Judging", *arguments, "--journal", "other.jsonl")
    assert journal.path == Path("other.jsonl")
    _, options = called("feedback.agreement:validation", *arguments[:1], "data.jsonl", "--validate", *arguments[3:])
    assert options == {"again": True, "device": "cuda:1"}


def test_score(called):
    (_, settings, journal), options = called(
        "feedback.teacher:score_with_model", "score", "data.jsonl", "o.jsonl", "--model", "m", "--device", "cuda:1",
        "--length-penalty", "0.5",
    )  # fmt: skip
    assert (settings.model, settings.length_penalty, options) == ("m", 0.5, {"device": "cuda:1"})
    assert journal.path == Path("o.journal.jsonl")
    _, options = called(
        "feedback.recorded:score_recorded", "score", "data.jsonl", "o.jsonl", "--logprobs", "lp", "--lengths", "n",
        "--teacher", "davinci", "--column", "prompt=prompt", "--column", "completions=completions[]",
        "--length-penalty", "0.5", "--skip-bad-rows",
    )  # fmt: skip
    assert options == {"completions": "completions[]", "logprobs": "lp", "lengths": "n", "tokenizer": None,
                       "teacher": "davinci", "skip_bad_rows": True, "length_penalty": 0.5}  # fmt: skip


def test_sample(called, monkeypatch):
    from contextlib import nullcontext

    from tuna_peft.run import samplers

    loaded = ("--upto", "sft", "--base-model", "b", "--quantization", "fp4", "--device", "cuda:1")
    arguments = ("sample", "m", "data.jsonl", "o.jsonl", "--seed", "4", "--backend", "vllm", *loaded)
    args, options = called("run.samplers:open_sampler", *arguments)
    assert args == ("m", "vllm")
    assert options == {"upto": "sft", "base_model": "b", "quantization": "fp4", "device": "cuda:1"}
    monkeypatch.setattr(samplers, "open_sampler", lambda *args, **options: nullcontext(("the sampler", None)))
    (sampler, records, settings, _), options = called(
        "feedback.sampling:sample_candidates", *arguments, "--template", "none", "--n", "3"
    )
    assert (sampler, len(records), settings.n, options) == ("the sampler", 3, 3, {"seed": 4})


def test_generate(called, monkeypatch):
    from types import SimpleNamespace

    from tuna_peft.data import texts
    from tuna_peft.models.stack import any_model

    arguments = ("generate", "m", "Say {x}.", "--input", "more", "--max-new-tokens", "9", "--upto", "sft",
                 "--template", "{instruction}|{input}", "--base-model", "b", "--device", "cuda:1", "--n", "3",
                 "--temperature", "0.7", "--top-p", "0.9", "--seed", "5")  # fmt: skip
    args, options = called("models.stack.any_model:load_any_model", *arguments)
    assert args == ("m",) and options == {"upto": "sft", "base_model": "b", "device": "cuda:1"}
    loaded = SimpleNamespace(model="the model", tokenizer="its tokenizer", prompt={})
    monkeypatch.setattr(any_model, "load_any_model", lambda *args, **options: loaded)
    monkeypatch.setattr(texts, "prompt_ids", lambda prompt, tokenizer: [prompt])
    args, options = called("models.generation.generate:stream_responses", *arguments)
    assert args == ("the model", "its tokenizer", [["Say {x}.|more"]])
    assert options == {"max_new_tokens": 9, "n": 3, "temperature": 0.7, "top_p": 0.9, "seed": 5}


def test_evaluate(called):
    arguments = (
        "evaluate", "m", "batch_size=3", "--task", "ranking=data.jsonl", "--task", "lm-eval",
        "tasks.lm_eval.tasks=[x]", "--stage", "base", "--output", "o", "--template", "none", "--base-model", "b",
        "--quantization", "fp4",
        "--device", "cuda:1", "--trust-remote-code",
    )  # fmt: skip
    (model, settings, output), options = called("run.evaluate:evaluate_target", *arguments)
    assert (model, output, settings.batch_size, list(settings.tasks.given())) == ("m", Path("o"), 3,
                                                                                ["ranking", "lm_eval"])  # fmt: skip
    assert vars(options.pop("loading")) == {"base_model": "b", "quantization": "fp4", "device": "cuda:1",
                                            "trust_remote_code": True}  # fmt: skip
    assert options.pop("prompt").template == "none" and options == {"stages": ["base"]}


STACK = ("--upto", "sft", "--base-model", "b")
PROMPTS = [["found s", "p.jsonl", "b"]]


def test_combine_and_divergence(called, stack):
    args, options = called("export.combine:combine_stack", "combine", "s", "out", "--rank", "3", "--upto", "sft")
    assert args == ("found s", OUT) and options == {"upto": "sft", "base_model": None, "rank": 3, "with_base": False}
    args, options = called(
        "export.check:check_exports", "divergence", "s", "one", "two", *STACK, "--prompts", "p.jsonl"
    )
    assert args == ("found s", [Path("one"), Path("two")], PROMPTS)
    assert options == {"upto": "sft", "base_model": "b"}


def test_merge(called, stack):
    arguments = ("merge", "s", "out", *STACK, "--prompts", "p.jsonl", "--dtype", "float16", "--base", "original", LOST)
    args, options = called("export.merge:merge_stack", *arguments)
    assert args == ("found s", OUT)
    assert options == {"dtype": "float16", "base": "original", "upto": "sft", "base_model": "b",
                       "allow_lost_update": True}  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--compare",), ("--no-check",)])
def test_what_follows_a_merge(called, stack, monkeypatch, more):
    from types import SimpleNamespace

    report = SimpleNamespace(path=OUT, adapters=["a"], base="x", dtype="y", nbytes=1, seconds=1.0, kept_update=None)
    monkeypatch.setattr("tuna_peft.export.merge.merge_stack", lambda *args, **options: report)
    arguments = ("merge", "s", "out", *STACK, "--prompts", "p.jsonl", *more)
    if more == ("--no-check",):
        spy(monkeypatch, importlib.import_module("tuna_peft.export.check"), "check_exports")
        assert CliRunner().invoke(app, list(arguments)).exit_code == 0
        return
    target = "export.compare_exports:compare_exports" if more else "export.check:check_exports"
    args, options = called(target, *arguments)
    options.pop("write_gguf", None)  # given to `compare_exports` only
    assert PROMPTS in args and options == {"upto": "sft", "base_model": "b"}


def test_export_gguf(called, stack):
    Path("model").mkdir()
    args, options = called(
        "export.gguf.model:export_gguf", "export", "gguf", "model", "out", "-t", "q4_0", "-t", "f16", "--name", "n",
        "--imatrix", "i.dat", LOST,
    )  # fmt: skip
    assert args == (Path("model"), OUT)
    assert options == {"types": ["q4_0", "f16"], "name": "n", "imatrix": Path("i.dat"), "stack_dir": None,
                       "allow_lost_update": True}  # fmt: skip
    (Path("model") / "adapter_config.json").touch()
    args, options = called("export.gguf.adapter:export_gguf_adapter", "export", "gguf", "model", "out", "-t", "f16",
                           "--name", "n", *STACK)  # fmt: skip
    assert options == {"type": "f16", "name": "n", "upto": "sft", "base_model": "b"}
    args, options = called(
        "export.gguf.choose:export_gguf_of_stack", "export", "gguf", "s", "out", "--base", "auto", "-t", "q4_0",
        "--name", "n", "--imatrix", "i.dat", "--prompts", "p.jsonl", *STACK, LOST,
    )  # fmt: skip
    assert args == ("found s", OUT, PROMPTS)
    assert options == {"types": ["q4_0"], "name": "n", "upto": "sft", "base_model": "b", "imatrix": Path("i.dat"),
                       "allow_lost_update": True}  # fmt: skip


def test_push(called):
    args, options = called(
        "export.hub:push", "push", "run", "me/x", "--what", "merged", "--public", "--revision", "v9", "--pr",
        "--base-id", "some/base", "--license", "mit", "--data-license", "CC0", "-m", "words", "--dry-run",
    )  # fmt: skip
    assert args == (Path("run"), "me/x")
    assert options == {
        "kind": "merged", "private": False, "revision": "v9", "create_pr": True, "base_id": "some/base",
        "license": "mit", "data_license": "CC0", "message": "words", "dry_run": True,
    }  # fmt: skip


def test_run_and_plan(called):
    overrides = ("name=other", "seed=3")
    (recipe, folder), _ = called("run.pipeline:run_recipe", "run", "quickstart", *overrides, "-o", "o")
    assert (recipe.name, recipe.seed, folder) == ("other", 3, Path("o"))
    assert called("run.pipeline:run_recipe", "run", "quickstart", *overrides)[0][1] == Path("runs/other")
    (recipe, folder), _ = called("run.dry_run:describe_recipe", "run", "quickstart", *overrides, "--dry-run")
    assert (recipe.seed, folder) == (3, Path("runs/other"))
    (recipe, devices), _ = called("planning.from_recipe:plan_recipe", "plan", "quickstart", *overrides, "--gpu", "L4")
    assert (recipe.seed, [device.name for device in devices]) == (3, ["L4"])


def test_sizes_of_local_teachers_and_judges_are_planned_and_stay(called, monkeypatch):
    """By the memory of the first time: `pico-llama` is small enough for the largest sizes on a CPU."""
    for command, work, key, largest in (
        ("score", "feedback.teacher:score_with_model", "max_tokens_per_batch", 4096),
        ("judge", "feedback.judge:Judging", "batch_size", 32),
    ):
        arguments = (command, "data.jsonl", f"{command}.jsonl", "--model", "builtin:pico-llama", "--device", "cpu")
        assert getattr(called(work, *arguments)[0][1], key) == largest
        with monkeypatch.context() as less:
            less.setattr("tuna_peft.planning.from_recipe.available_ram", lambda: 0.0)
            assert getattr(called(work, *arguments)[0][1], key) == largest
            arguments = (command, "data.jsonl", f"{command}2.jsonl", *arguments[3:])
            assert getattr(called(work, *arguments)[0][1], key) < largest
        given = ("--" + key.replace("_", "-"), "5")
        assert getattr(called(work, *arguments, *given)[0][1], key) == 5
