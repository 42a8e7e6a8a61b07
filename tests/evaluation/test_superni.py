"""Super-NaturalInstructions: Tk-Instruct's metrics and prompts, and files that are broken or incomplete."""

import json
from pathlib import Path

import pytest
from scripted_session import RAW, Scripted

from tuna_peft.errors import UserError
from tuna_peft.evaluation.superni import (
    encode,
    evaluate_superni,
    exact_match,
    read_superni,
    rouge_l,
    superni_questions,
)

DATA = Path(__file__).parents[3] / "shared" / "data" / "superni"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/superni")


def instance(**changes):
    examples = [{"input": "one", "output": "1"}, {"input": "two?", "output": "2"}]
    return {"task": "task1_x", "category": "Word Analogy", "id": "task1-a", "definition": ["Count"],
            "positive_examples": examples, "input": " three ", "output": ["3"], **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("response", "references", "rouge", "exact"),
    [
        ("The cat sat", ["the cat sat."], 100, 100),
        ("a dog", ["cat", "A dog!"], 100, 100),  # the best of the references
        ("police killed the gunman", ["police kill the gunman"], 100, 0),  # the stems agree
        ("the gunman kill police", ["police kill the gunman"], 50, 0),  # 2 of 4 in order
        ("the cat", ["cat"], 100 * 2 / 3, 0),  # precision 1/2, recall 1
        ("", ["cat"], 0, 0),
    ],
)
def test_scores(response, references, rouge, exact):
    assert rouge_l(response, references) == pytest.approx(rouge)
    assert exact_match(response, references) == exact


def test_the_encoding():
    assert encode(instance(), []) == (
        "Definition: Count.\n\nNow complete the following example -\nInput: three.\nOutput: "
    )
    assert encode(instance(), instance()["positive_examples"]) == (
        "Definition: Count.\n\n Positive Example 1 -\nInput: one.\n Output: 1.\n\n"
        " Positive Example 2 -\nInput: two?\n Output: 2.\n\n"
        "Now complete the following example -\nInput: three.\nOutput: "
    )


def test_a_checkout_of_the_benchmark(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "splits" / "default").mkdir(parents=True)
    (tmp_path / "splits" / "default" / "test_tasks.txt").write_text("task1_x\ntask2_y\ntask3_z\n")
    content = {
        "Definition": ["Count"], "Categories": ["Word Analogy"], "Positive Examples": instance()["positive_examples"],
        "Instances": [{"id": f"task1-{i}", "input": str(i), "output": [str(i)]} for i in range(5)]
                     + [{"id": "task1-bad", "input": "x", "output": []}],
    }  # fmt: skip
    (tmp_path / "tasks" / "task1_x.json").write_text(json.dumps(content))
    (tmp_path / "tasks" / "task2_y.json").write_text('{"Definition": [')
    (tmp_path / "tasks" / "task9_other.json").write_text(json.dumps(content))
    instances, left_out = read_superni(tmp_path, per_task=None)
    assert [one["id"] for one in instances] == [f"task1-{i}" for i in range(5)]
    by_reason = {one.reason: one.names for one in left_out}
    assert by_reason["the task is missing"] == ["task2_y", "task3_z"]
    assert by_reason["the file cannot be read (JSONDecodeError)"] == ["task2_y.json"]
    assert by_reason["the instance has no references"] == ["task1-bad"]
    assert len(read_superni(tmp_path, ["task1_x"], per_task=2)[0]) == 2


def test_lines_that_are_broken_are_named(tmp_path):
    file = tmp_path / "instances.jsonl"
    lines = [instance(), instance(id="task1-b", output=["?!"]), instance(id="task1-c", definition=None)]
    file.write_text("\n".join([*map(json.dumps, lines), "3", '{"task": "task1']))
    instances, left_out = read_superni(file, ["task1_x", "task7_gone"])
    assert [one["id"] for one in instances] == ["task1-a"]
    by_reason = {one.reason: one.names for one in left_out}
    assert by_reason["the line is no JSON"] == ["instances.jsonl: line 5"]
    assert by_reason["the line is no JSON object"] == ["instances.jsonl: line 4"]
    assert by_reason["no reference has a letter or digit, which is all that ROUGE-L compares"] == ["task1-b"]
    assert by_reason["the instance has no definition or no category"] == ["task1-c"]
    assert by_reason["the task is missing"] == ["task7_gone"]
    with pytest.raises(UserError, match="no instance can be used .*the task is missing: task8"):
        read_superni(file, ["task8_gone"])


def test_too_few_examples_for_the_shots():
    questions, left_out = superni_questions([instance(), instance(id="b", positive_examples=[])], 2, RAW)
    assert [question.id for question in questions] == ["task1-a"] and left_out[0].names == ["b"]


@pytest.mark.parametrize("shots", [0, 1, 2, 3])
def test_a_prompt_has_as_many_examples_as_shots(shots):
    examples = [{"input": f"in {number}", "output": f"out {number}"} for number in range(3)]
    [question], _ = superni_questions([instance(positive_examples=examples)], shots, RAW)
    assert [number for number in range(3) if f"in {number}" in question.prompt] == list(range(shots))


def test_by_task_and_category():
    instances = [instance(), instance(id="b", task="task2_y", output=["four"]), instance(id="c", category="Other")]
    questions, _ = superni_questions(instances, 0, RAW)
    result = evaluate_superni(Scripted(lambda question: "3"), questions, shots=0, max_new_tokens=4)
    assert result.task == "superni-0shot" and result.metrics["rouge_l"].value == pytest.approx(200 / 3)
    assert result.groups["task: task2_y"]["exact_match"].value == 0
    assert result.groups["category: Word Analogy"]["rouge_l"].value == 50
    assert result.groups["category: Other"]["rouge_l"].count == 1


@needs_data
def test_fixed_baselines_on_the_real_test_instances():
    """What can be said without a model: docs/evaluation.md has these numbers."""
    instances, left_out = read_superni(DATA / "test_instances.jsonl")
    assert len(instances) == 1500 and not left_out
    questions, _ = superni_questions(instances, 2, RAW)

    def rouge(say):
        return evaluate_superni(Scripted(say), questions, shots=2, max_new_tokens=4).metrics

    first = rouge(lambda question: question.references[0])
    assert (first["rouge_l"].value, first["exact_match"].value) == (100, 100)
    by_id = {one["id"]: one for one in instances}
    example = rouge(lambda question: by_id[question.id]["positive_examples"][0]["output"])
    assert (example["rouge_l"].value, example["exact_match"].value) == pytest.approx((9.89, 3.40), abs=0.005)
