"""Whole runs on a base with a chat template: date, tools, several turns, the warning about the default prompt."""

from __future__ import annotations

import datetime
import json
import logging

import pytest
from test_pipeline import TRAIN, Crash, _with
from tiny_llama import write_base
from transformers import AutoTokenizer
from typer.testing import CliRunner

import tuna_peft.run.train_stage as train_stage_module
from tuna_peft import AdapterStack
from tuna_peft.cli.app import app
from tuna_peft.data import texts
from tuna_peft.data.texts import prompt_ids
from tuna_peft.errors import UserError
from tuna_peft.evaluation import session
from tuna_peft.feedback import sampling
from tuna_peft.recipe.schema import Recipe
from tuna_peft.run.dry_run import describe_recipe
from tuna_peft.run.pipeline import run_recipe

# Words of the tiny tokenizer: the day of the month, the names of tools, then the turns.
TEMPLATE = (
    "{{ 'w' + strftime_now('%-d') + ' ' }}"
    "{% for tool in tools or [] %}{{ tool['function']['name'] + ' ' }}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'w4 ' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}{% endfor %}{{ ' ' + eos_token + ' ' }}"
    "{% else %}{{ 'w3 ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w4 ' }}{% endif %}"
)
DAYS = [datetime.date(2026, 1, day) for day in (15, 16)]
TOOLS = [{"type": "function", "function": {"name": "w77"}}]
PROMPT = [{"role": "user", "content": "w30"}]


def by_words(record, response):
    """A grader for the tests: how many different words?"""
    return float(len(set(response.split())))


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "base"
    write_base(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(base, tmp_path):
    def make(rows, *, data=None, **changes):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage = {"name": "rank", "type": "ranking", "data": data or {"path": str(path)}, "train": TRAIN}
        values = {
            "name": "chat", "base": {"model": base, "device": "cpu"}, "prompt": {"template": "chat"}, "lora": {"r": 2},
            "stages": [stage], "evaluation": None,
            "export": {"combine": False, "merge": {"enabled": False}, "divergence_prompts": 0},
        }  # fmt: skip
        return values | changes

    return make


def run(values, folder):
    return run_recipe(Recipe.model_validate(values), folder)


def pairs(count):
    return [
        {"prompt": [{"role": "user", "content": f"w{i + 30}"}], "completions": ["w5 w6", "w7"], "scores": [1, 0]}
        for i in range(count)
    ]


def weights(folder):
    return (folder / "stack" / "rank" / "adapter_model.safetensors").read_bytes()


def test_a_run_that_is_resumed_the_next_day_keeps_its_date(make, tmp_path, monkeypatch):
    recipe = make(pairs(8))
    monkeypatch.setattr(texts, "_STARTED", DAYS[0])
    run(recipe, tmp_path / "straight")
    crash, real = Crash(3), train_stage_module._trainer
    with monkeypatch.context() as patch:
        patch.setattr(train_stage_module, "_trainer", lambda *args: _with(real(*args), crash))
        with pytest.raises(RuntimeError, match="crash"):
            run(recipe, tmp_path / "run")
    monkeypatch.setattr(texts, "_STARTED", DAYS[1])
    report = run(recipe, tmp_path / "run")
    assert report["stages"]["rank"]["resumed_from"]
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    run(recipe, tmp_path / "next day")
    assert weights(tmp_path / "next day") != weights(tmp_path / "straight")  # the date is in the prompts
    # Generation shows the date of training, also from the stack alone.
    assert json.loads((tmp_path / "run" / "stack" / "stack.json").read_text())["prompt"]["date"] == str(DAYS[0])
    stack = AdapterStack.from_pretrained(tmp_path / "run" / "stack", device="cpu")
    assert "w15" in stack.tokenizer.decode(prompt_ids(PROMPT, stack.tokenizer))


def test_samples_are_drawn_with_the_tools_of_their_prompt(make, tmp_path, monkeypatch):
    rows = [{"prompt": one["prompt"], "tools": TOOLS} for one in pairs(4)]
    sampled, real = [], sampling.ModelSampler.sample

    def spy(sampler, prompts, *args, **options):
        sampled.extend(sampler.tokenizer.decode(ids) for ids in prompts)
        return real(sampler, prompts, *args, **options)

    monkeypatch.setattr(sampling.ModelSampler, "sample", spy)
    sample = {"n": 3, "max_new_tokens": 5, "batch_size": 4, "trials": 1}
    data = {
        "prompts": {"path": str(tmp_path / "rows.jsonl")},
        "sample": sample,
        "judge": {"function": "test_chat_runs:by_words"},
    }
    run(make(rows, data=data), tmp_path / "run")
    ranked = [json.loads(line) for line in (tmp_path / "run/stages/rank/ranked.jsonl").read_text().splitlines()]
    assert ranked and all(row["tools"] == TOOLS for row in ranked)
    assert len(sampled) == 4 and all(" w77 w3 w3" in text for text in sampled)  # before the question w30 to w33


def test_several_turns_and_tool_calls_train_and_are_measured(make, tmp_path, monkeypatch):
    asked, real = [], session.prompt_ids

    def spy(prompt, tokenizer, tools=None):
        ids = real(prompt, tokenizer, tools)
        asked.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(session, "prompt_ids", spy)
    call = said(None, tool_calls=[{"function": {"name": "w77", "arguments": {}}}])
    turns = [call, {"role": "tool", "content": "w40"}, said("w41")]
    rows = [
        {"prompt": one["prompt"], "tools": TOOLS, "completions": [turns, "w7", [call]], "scores": [2, 0, 1]}
        for one in pairs(20)
    ]
    report = run(make(rows, evaluation="auto"), tmp_path / "run")
    counts = report["data"]["rank"]
    assert counts["kept"] == 20 and counts["tokens"]["responses"] == 3 * counts["tokens"]["rows"]
    assert report["evaluation"]["rank"]["ranking"]["metrics"]["pair_accuracy"]["count"] == 6  # of 2 prompts
    answers = json.loads((tmp_path / "run/evaluation/rank/answers.json").read_text())["prompts"]
    assert [one["references"][0].splitlines()[0] for one in answers] == [
        'assistant: {"name": "w77", "arguments": {}}'
    ] * 2
    assert asked and all(
        " w77 w3 w" in text for text in asked
    )  # the tools stand before the question in generation too


@pytest.mark.parametrize("command", ["run", "plan", "dry-run"])
def test_a_chat_model_with_the_default_prompt_is_pointed_out(make, tmp_path, command, caplog):
    rows = [{"instruction": one["prompt"][0]["content"], "input": "", "output": "w5"} for one in pairs(8)]
    stage = {"name": "sft", "type": "sft", "data": {"path": str(tmp_path / "rows.jsonl")}, "train": TRAIN}
    words = {"run": ["run"], "plan": ["plan"], "dry-run": ["run", "--dry-run"]}[command]

    def said_by(prompt):
        caplog.clear()
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps(make(rows, stages=[stage], **prompt)))
        output = [] if command == "plan" else ["--output", str(tmp_path / f"run {len(prompt)}")]
        with caplog.at_level(logging.WARNING, "tuna_peft"):
            result = CliRunner().invoke(app, [*words, str(recipe), *output])
        assert result.exit_code == 0, result.output
        return caplog.text + result.output

    assert "write `prompt: {template: chat}`" in said_by({"prompt": {}})
    assert "is a chat model" not in said_by({"prompt": {"template": "alpaca"}})


def test_a_dry_run_notices_a_teacher_that_cannot_read_the_prompts(make, tmp_path):
    write_base(tmp_path / "teacher")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    data = {"prompts": {"path": str(tmp_path / "prompts.jsonl")}, "score": {"model": str(tmp_path / "teacher")}}
    recipe = Recipe.model_validate(make([], data=data | {"sample": {"n": 2, "max_new_tokens": 2}}))
    for check in (describe_recipe, run_recipe):
        with pytest.raises(UserError, match="the teacher's tokenizer has no chat template"):
            check(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "stages" / "rank" / "samples.journal.jsonl").exists()


def test_a_dry_run_notices_a_base_without_a_chat_template(make, tmp_path):
    write_base(tmp_path / "base")
    data = {"prompts": {"path": str(tmp_path / "prompts.jsonl")}, "judge": {"function": "test_chat_runs:by_words"}}
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    values = make([], data=data | {"sample": {"n": 2}}, base={"model": str(tmp_path / "base")})
    with pytest.raises(UserError, match="no chat template"):
        describe_recipe(Recipe.model_validate(values), tmp_path / "run")
