"""Judges that run here: causal LMs and programs."""

from __future__ import annotations

import linecache
import os
import sys
import types

import pytest
from chain_llama import write_chain
from honest_judge import grade, rows

from tuna_peft.errors import UserError
from tuna_peft.feedback import local_model
from tuna_peft.feedback.judge import Judging, judge_pairs, judge_rows
from tuna_peft.feedback.settings import JudgeSettings
from tuna_peft.journal import Journal


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("judge"), "rank: [2, 3, 1, 0]")


def test_a_model_ranks(judge_model, tmp_path, monkeypatch):
    records, report = judge_rows(rows(5), JudgeSettings(model=judge_model), tmp_path / "j.jsonl")
    with Journal(tmp_path / "j.jsonl") as journal:
        judging = Judging(rows(5), JudgeSettings(model=judge_model), journal)
        for record, question in zip(records, judging.questions.values(), strict=True):
            assert record["completions"] == [question.responses[i] for i in (2, 3, 1, 0)]
    assert (report.ranked, report.asked, report.left_out) == (5, 5, {})
    # What is known needs no model.
    monkeypatch.setattr(local_model, "load_any_model", lambda *args, **kwargs: pytest.fail("loaded"))
    again, second = judge_rows(rows(5), JudgeSettings(model=judge_model), tmp_path / "j.jsonl")
    assert (again, second.found, second.asked) == (records, 5, 0)


def test_its_position_bias_makes_ties(judge_model, tmp_path):
    settings = JudgeSettings(model=judge_model, both_orders=True)
    with pytest.raises(UserError, match="all tied: 3"):
        judge_rows(rows(3), settings, tmp_path / "j.jsonl")


@pytest.mark.parametrize("attempts", [1, 2])
def test_an_interrupted_model_forms_the_same_batches(judge_model, tmp_path, monkeypatch, attempts):
    """Half of the questions are known already, and attempts fail at first: what is generated stands where it stood."""
    from tuna_peft.feedback import judges
    from tuna_peft.models.generation import generate

    batches: list[list[list[int]]] = []
    real = generate.stream_responses

    def watched(model, tokenizer, prompts, *, done, **options):
        batches.append([list(prompt) for prompt in prompts])
        return real(model, tokenizer, prompts, done=done, **options)

    monkeypatch.setattr(generate, "stream_responses", watched)
    picky = judges.why_unreadable
    if attempts == 2:  # no first answer will do
        monkeypatch.setattr(judges, "why_unreadable", lambda *a: "no" if len(batches) % 2 else picky(*a))
    settings = JudgeSettings(model=judge_model, attempts=attempts, max_tokens=9, batch_size=2)
    with Journal(tmp_path / "a.jsonl") as journal:
        judge_rows(rows(6), settings, tmp_path / "b.jsonl")
        straight = [*batches]
        batches.clear()
        with Journal(tmp_path / "b.jsonl") as whole:
            for key in list(whole)[::2]:
                journal.add(key, whole[key])
    records, report = judge_rows(rows(6), settings, tmp_path / "a.jsonl")
    assert (report.found, report.asked, len(records)) == (3, 3, 6)
    assert batches == straight and len(batches) == attempts


def test_every_attempt_has_its_own_seed_and_temperature_and_the_limits_of_the_settings(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from tuna_peft.models.generation import generate
    from tuna_peft.models.generation.generate import Generated

    asked = []

    def stream(model, tokenizer, prompts, **options):
        asked.append(options)
        return (Generated(place, ["no ranking"], [1], [True]) for place in range(len(prompts)))

    loaded = SimpleNamespace(model="m", tokenizer=SimpleNamespace(chat_template="yes"))
    monkeypatch.setattr(local_model, "load_local_model", lambda settings, device: loaded)
    monkeypatch.setattr(generate, "stream_responses", stream)
    monkeypatch.setattr(generate, "context_of", lambda model: None)
    monkeypatch.setattr("tuna_peft.models.generation.dense.has_room_for_dense", lambda model: False)
    monkeypatch.setattr("tuna_peft.data.texts.prompt_ids", lambda text, tokenizer: [1])
    settings = JudgeSettings(model="m", temperature=0.2, seed=7, attempts=4, max_tokens=9, batch_size=5)
    with pytest.raises(UserError, match="unreadable: 2"):
        judge_rows(rows(2), settings, tmp_path / "j.jsonl")
    assert [options["seed"] for options in asked] == ["7-0", "7-1", "7-2", "7-3"]
    assert [options["temperature"] for options in asked] == pytest.approx([0.2, 0.5, 0.8, 1.0])
    assert {(options["max_new_tokens"], options["batch_size"]) for options in asked} == {(9, 5)}


def test_a_model_that_is_trained_again_is_asked_again(judge_model, tmp_path):
    judge_rows(rows(1), JudgeSettings(model=judge_model), tmp_path / "j.jsonl")
    os.utime(f"{judge_model}/model.safetensors", ns=(1, 1))
    _, report = judge_rows(rows(1), JudgeSettings(model=judge_model), tmp_path / "j.jsonl")
    assert report.asked == 1


def test_a_model_that_cannot_judge(tmp_path):
    """pico-LLaMA's context is too short for the rules alone; a model with room says something else."""
    with pytest.raises(UserError, match="2 of 2 questions have no answer.*do not fit into the judge's context of 512"):
        judge_rows(rows(2), JudgeSettings(model="builtin:pico-llama"), tmp_path / "j.jsonl")
    chatter = write_chain(tmp_path / "chatter", "All of them are very good.")
    settings = JudgeSettings(model=chatter, attempts=2, max_tokens=9)
    with pytest.raises(UserError, match="ranked none of 2 prompts \\(unreadable: 2\\)"):
        judge_rows(rows(2), settings, tmp_path / "j.jsonl")
    with Journal(tmp_path / "j.jsonl") as journal:
        assert [journal[key]["text"] for key in journal] == ["All of them are very good."] * 2
    cut = JudgeSettings(model=write_chain(tmp_path / "cut", "rank: [2, 3, 1, 0]"), attempts=1, max_tokens=5)
    with pytest.raises(UserError, match="unreadable: 2"):  # all is said, but not that it ends there
        judge_rows(rows(2), cut, tmp_path / "j.jsonl")


@pytest.fixture
def program(monkeypatch):
    def make(function):
        module = types.ModuleType("a_judge")
        module.judge = function
        monkeypatch.setitem(sys.modules, "a_judge", module)
        return JudgeSettings(function="a_judge:judge")

    return make


def test_a_program_gives_scores_and_ties(program, tmp_path):
    given = [{**row, "record": {"even": True}} for row in rows(7)]
    settings = program(lambda record, response: grade(response) % 2 == 0 and record["even"])
    records, report = judge_rows(given, settings, tmp_path / "j.jsonl")
    assert all(set(record["scores"]) == {1.0, 0.0} for record in records)
    assert all(grade(record["completions"][0]) % 2 == 0 for record in records)
    assert report.ranked + sum(report.left_out.values()) == 7


def test_pairs(program, tmp_path):
    settings = program(lambda record, response: grade(response))
    given = [
        {"id": i, "prompt": f"p{i}", "completions": [f"grade {a}", f"grade {b}"]}
        for i, (a, b) in enumerate([(3, 1), (1, 3), (2, 2)])
    ] + [{"id": 3, "prompt": "p", "completions": ["grade 2", "2 grade 2"]}]
    outcomes, report = judge_pairs(given, settings, tmp_path / "j.jsonl")
    assert outcomes == [1, -1, 0, 0]
    assert report.asked == 3  # the same response twice is a tie


@pytest.mark.parametrize("wrong", [None, "good", float("nan"), float("inf"), [1.0], 1j])
def test_programs_that_give_no_number(program, tmp_path, wrong):
    with pytest.raises(
        UserError, match="prompt 0: 2 of 2 .* the judge a_judge:judge returned .*, not a finite number"
    ):
        judge_rows(rows(2), program(lambda record, response: wrong), tmp_path / "j.jsonl")


def test_programs_that_fail(program, tmp_path):
    with pytest.raises(UserError, match="prompt 0: 2 of 2 .* the judge a_judge:judge failed with ZeroDivisionError"):
        judge_rows(rows(2), program(lambda record, response: 1 / 0), tmp_path / "j.jsonl")
    with pytest.raises(UserError, match="8 requests in a row have failed, the last with: .* ZeroDivisionError"):
        judge_rows(rows(9), program(lambda record, response: 1 / 0), tmp_path / "j.jsonl")


def test_a_program_that_fails_for_some_prompts_costs_only_these(program, tmp_path):
    settings = program(lambda record, response: 1 / (response != "a 0"))
    given = [{"id": i, "prompt": f"p{i}", "completions": [f"a {i}", "a 5"]} for i in range(3)]
    skipping = settings.model_copy(update={"on_no_answer": "skip"})
    outcomes, report = judge_pairs(given, skipping, tmp_path / "j.jsonl")
    assert outcomes == [None, 0, 0] and report.left_out == {"no answer": 1}


def test_a_program_is_known_by_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    asked = []
    for version in ("len(response)", "len(response)", "-len(response)"):
        (tmp_path / "my_judge.py").write_text(f"def judge(record, response):\n    return {version}\n")
        sys.modules.pop("my_judge", None)
        linecache.clearcache()
        given = [{"id": "0", "prompt": "p", "completions": ["a", "bb"]}]
        [record], report = judge_rows(given, JudgeSettings(function="my_judge:judge"), tmp_path / "j.jsonl")
        asked.append((record["completions"][0], report.asked))
    sys.modules.pop("my_judge")
    assert asked == [("bb", 1), ("bb", 0), ("a", 1)]
