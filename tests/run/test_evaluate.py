"""Evaluation of every stage on one loaded base: cached results, wrong inputs, and the commands."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tiny_llama import write_base, write_stack
from typer.testing import CliRunner

import tuna_peft.run.evaluate as module
from tuna_peft import AdapterStack
from tuna_peft.cli.app import app
from tuna_peft.data.texts import prompt_ids
from tuna_peft.errors import UserError
from tuna_peft.evaluation import session as session_module
from tuna_peft.evaluation.report.write import write_report
from tuna_peft.evaluation.results import load_results
from tuna_peft.models.base.load import resolve_device
from tuna_peft.models.generation.generate import generate_responses
from tuna_peft.models.stack import files as stack_files
from tuna_peft.models.stack.adapters import active_adapters
from tuna_peft.recipe.evaluation_schema import EvaluationSettings
from tuna_peft.run.evaluate import evaluate_target


def grade(record, response):
    return len(response.split()) / 10


def judge(record, response):
    if record["question_id"] == 1:
        raise ValueError("cannot tell")
    return len(response)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base with a stack of two adapters on it, ranked data, and questions."""
    root = tmp_path_factory.mktemp("files")
    write_stack(root / "stack", write_base(root / "base"), "none")
    ranked = [{"id": str(i), "prompt": f"w{i + 3} w9 ", "completions": ["w5 w6", "w7", "w8 w9 w4"],
               "scores": [2.0, 1.0, float(i % 2)]} for i in range(6)]  # fmt: skip
    (root / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    questions = [{"question_id": i, "text": f"w{i + 11} w12", "category": "c"} for i in range(3)]
    (root / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return root


def settings(files, **tasks):
    data = {"path": str(files / "ranked.jsonl")}
    given = {"ranking": data, "graded": {**data, "grader": "test_evaluate:grade", "max_new_tokens": 3}}
    return EvaluationSettings.model_validate({"tasks": tasks or given, "batch_size": 4})


@pytest.fixture(scope="module")
def evaluated(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    return output, evaluate_target(str(files / "stack"), settings(files), output)


def test_one_load_serves_all_stages_and_each_is_what_it_would_be_alone(files, evaluated, tmp_path, monkeypatch):
    loads = []
    real = stack_files.load_base
    monkeypatch.setattr(stack_files, "load_base", lambda *args, **kwargs: loads.append(1) or real(*args, **kwargs))
    results = evaluate_target(str(files / "stack"), settings(files), tmp_path / "again")
    assert list(results) == ["base", "sft", "ranking"] and len(loads) == 1
    for stage in results:
        alone = AdapterStack.from_pretrained(files / "stack", upto=None if stage == "base" else stage, device="cpu")
        prompts = results[stage]["graded"].prompts
        ids = [prompt_ids(prompt.prompt, alone.tokenizer) for prompt in prompts]
        with active_adapters(alone.model, [] if stage == "base" else alone.names):
            texts = generate_responses(alone.model, alone.tokenizer, ids, max_new_tokens=3, batch_size=4)
        assert texts == [prompt.response for prompt in prompts]
    v = [results[stage]["ranking"].prompts[0].details["v"] for stage in results]
    assert v[0] != v[1] != v[2]
    saved = load_results(tmp_path / "again", ["base", "sft", "ranking"])
    assert {stage: list(tasks) for stage, tasks in saved.items()} == dict.fromkeys(results, ["graded", "ranking"])
    assert saved["sft"]["graded"] == results["sft"]["graded"]


def test_saved_results_are_not_measured_again(files, evaluated, monkeypatch):
    output, before = evaluated
    monkeypatch.setattr(session_module, "stream_responses", lambda *args, **kwargs: pytest.fail("generated again"))
    assert evaluate_target(str(files / "stack"), settings(files), output) == before


def test_an_interrupted_task_generates_only_missing_responses(files, evaluated, tmp_path, monkeypatch):
    real, spoken = session_module.stream_responses, []

    def dies(*args, **kwargs):
        for generated in real(*args, **kwargs):
            yield generated
            spoken.append(generated.index)
            if len(spoken) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(session_module, "stream_responses", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate_target(str(files / "stack"), settings(files), tmp_path, stages=["sft"])
    counted = []

    def counts(model, tokenizer, prompts, **kwargs):
        counted.append(len(prompts) - len(kwargs["done"]))
        return real(model, tokenizer, prompts, **kwargs)

    monkeypatch.setattr(session_module, "stream_responses", counts)
    result = evaluate_target(str(files / "stack"), settings(files), tmp_path, stages=["sft"])["sft"]["graded"]
    assert counted == [2] and result.prompts == evaluated[1]["sft"]["graded"].prompts


def test_other_settings_do_not_overwrite_a_result(files, evaluated):
    changed = settings(files)
    changed.tasks.graded.max_new_tokens = 2
    with pytest.raises(UserError, match=r"base has a result for graded already, with other settings .max_new_tokens"):
        evaluate_target(str(files / "stack"), changed, evaluated[0])


def test_an_unknown_stage(files, tmp_path):
    with pytest.raises(UserError, match="no stage 'sftt'.*\n.*Did you mean `sft`"):
        evaluate_target(str(files / "stack"), settings(files), tmp_path, stages=["sftt"])


def test_vicuna_compares_with_the_base_and_the_judge_may_fail_for_some(files, tmp_path, monkeypatch):
    asked = []

    def judge_pairs(rows, judge, journal_path, *, device, description):
        asked.append((judge.both_orders, Path(journal_path).name, device, description))
        return [1, None, -1], None

    monkeypatch.setattr("tuna_peft.run.tasks.judge_pairs", judge_pairs)
    vicuna = {"path": str(files / "question.jsonl"), "judge": {"model": "org/judge"}, "max_new_tokens": 3}
    results = evaluate_target(str(files / "stack"), settings(files, vicuna=vicuna), tmp_path)
    assert results["base"]["vicuna"].metrics["win_rate"].value is None
    later = results["ranking"]["vicuna"]
    assert (later.metrics["win"].value, later.metrics["lose"].value, later.metrics["win"].count) == (0.5, 0.5, 2)
    assert [one.names for one in later.excluded] == [["1"]]
    device = str(resolve_device("auto"))  # the judge runs where the model does
    assert asked == [(True, "judge.jsonl", device, f"judging ({stage})") for stage in ("sft", "ranking")]
    against = [prompt.details["against"] for prompt in later.prompts]
    assert against == [prompt.response for prompt in results["base"]["vicuna"].prompts]


def test_vicuna_against_a_later_stage(files, tmp_path, monkeypatch):
    monkeypatch.setattr("tuna_peft.run.tasks.judge_pairs", lambda rows, *args, **kwargs: ([1] * len(rows), None))
    vicuna = {"path": str(files / "question.jsonl"), "against": "sft", "judge": {"model": "org/judge"},
              "max_new_tokens": 3}  # fmt: skip
    alone = evaluate_target(
        str(files / "stack"), settings(files, vicuna=vicuna), tmp_path / "alone", stages=["base"]
    )["base"]["vicuna"]  # fmt: skip
    assert alone.metrics["win_rate"].value is None and len(alone.prompts) == 3
    assert [(one.reason, one.count) for one in alone.excluded] == [("the stage sft had not answered yet", 3)]

    results = evaluate_target(str(files / "stack"), settings(files, vicuna=vicuna), tmp_path / "all")
    assert list(results) == ["base", "sft", "ranking"]
    assert [of_stage["vicuna"].metrics["win_rate"].value for of_stage in results.values()] == [1, None, 1]
    against = [prompt.details["against"] for prompt in results["base"]["vicuna"].prompts]
    assert against == [prompt.response for prompt in results["sft"]["vicuna"].prompts]

    with pytest.raises(UserError, match="no file 'sftt', and no stage"):
        wrong = settings(files, vicuna={**vicuna, "against": "sftt"})
        evaluate_target(str(files / "stack"), wrong, tmp_path / "wrong", stages=["base"])


def test_questions_that_a_python_judge_cannot_judge_are_skipped_by_name(files, tmp_path):
    answers = [{"question_id": i, "text": "w5"} for i in range(2)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    vicuna = {"path": str(files / "question.jsonl"), "against": str(tmp_path / "answers.jsonl"),
              "judge": {"function": "test_evaluate:judge"}, "max_new_tokens": 3}  # fmt: skip
    results = evaluate_target(str(files / "stack"), settings(files, vicuna=vicuna), tmp_path, stages=["sft"])
    result = results["sft"]["vicuna"]
    assert result.metrics["win_rate"].count == 1 and len(result.prompts) == 3
    assert {one.reason: one.names for one in result.excluded} == {
        "the judge gave no verdict": ["1"],
        "the other side has no answer to the question": ["2"],
    }


def test_the_commands(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stack, data = str(files / "stack"), str(files / "ranked.jsonl")

    def run(*arguments):
        return CliRunner().invoke(app, list(arguments))

    result = run("evaluate", stack, "--task", f"ranking={data}", "tasks.ranking.margin=0.2", "-o", "one")
    assert result.exit_code == 0, result.output
    assert "pair_accuracy" in result.output and "margin_satisfaction" in result.output
    page = Path("one/report.html").read_text()
    assert "evaluation of stack" in page and "2 adapters on" in page and "Not finished" not in page
    assert list(json.loads(Path("one/report.json").read_text())["evaluation"]) == ["base", "sft", "ranking"]
    assert "| ranking |" in Path("one/report.md").read_text()
    result = run("compare", "one@base", "one", "--show", "1", "--json", "compared.json")
    assert result.exit_code == 0, result.output
    compared = json.loads(Path("compared.json").read_text())
    assert compared["tasks"][0]["task"] == "ranking" and "ranking" in result.output
    for arguments, message in (
        (["evaluate", stack], "there is nothing to evaluate"),
        (["evaluate", stack, "-t", "rankin"], "Did you mean `ranking`?"),
        (["evaluate", stack, "-t", "superni"], "tasks.superni.path"),
        (["evaluate", stack, "-t", "superni=none.jsonl"], "there is no such file or folder"),
        (["evaluate", str(files / "base"), "-t", f"ranking={data}", "-o", "one"], "the folder is of another model"),
        (["compare", "one", "nowhere"], "there are no results"),
        (["compare", "one@sftt", "one"], "Did you mean `sft`?"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.output, (arguments, result.output)


def test_a_single_model_has_a_report_too_which_later_tasks_join(files, tmp_path):
    for task in ("ranking", "graded"):
        given = settings(files)
        setattr(given.tasks, task, None)
        evaluate_target(str(files / "base"), given, tmp_path)
        report = write_report(tmp_path)
    assert list(report["evaluation"]) == ["model"] and set(report["evaluation"]["model"]) == {"graded", "ranking"}
    assert set(report["data"]) == {"evaluation.graded", "evaluation.ranking"} and report["stages"] == {}
    page = (tmp_path / "report.html").read_text()
    assert "adapter" not in page.partition("</header>")[0] and "after model" not in page
    with pytest.raises(UserError, match="the folder is of another model"):
        evaluate_target(str(files / "stack"), settings(files), tmp_path)


def test_a_run_s_folder_takes_no_results_of_other_models(files, evaluated, tmp_path):
    shutil.copytree(files / "stack", tmp_path / "run" / "stack")
    facts = json.loads((evaluated[0] / "run.json").read_text())
    del facts["evaluated"], facts["adapters"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    evaluate_target(str(tmp_path / "run"), settings(files), tmp_path / "run", stages=["base"])
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == facts
    with pytest.raises(UserError, match="the folder is of another model"):
        evaluate_target(str(files / "stack"), settings(files), tmp_path / "run")


def test_the_harness_is_named_when_it_is_missing(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        evaluate_target(str(files / "stack"), settings(files, lm_eval={"tasks": ["x"]}), tmp_path)


def test_a_folder_of_the_harness_s_tasks_that_is_not_there(files, tmp_path):
    wrong = settings(files, lm_eval={"tasks": ["x"], "include_path": str(tmp_path / "task")})
    with pytest.raises(UserError, match=r"task: there is no such folder\n.*include_path"):
        evaluate_target(str(files / "stack"), wrong, tmp_path)


def test_a_run_knows_its_own_settings(tmp_path):
    assert module.settings_of_run(str(tmp_path)) == {}
    assert module.default_output("org/Model-7B") == Path("runs/evaluation-org-Model-7B")
