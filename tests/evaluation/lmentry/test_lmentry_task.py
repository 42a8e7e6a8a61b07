"""The task `lmentry`: broken and partial files, accuracy, robustness, the score."""

import json
from pathlib import Path

import pytest
from scripted_session import RAW, Scripted

from tuna_peft.errors import UserError
from tuna_peft.evaluation.lmentry.rules import RULES
from tuna_peft.evaluation.lmentry.scores import VARIANTS, Scored, robustness
from tuna_peft.evaluation.lmentry.task import TASKS, evaluate_lmentry, read_lmentry
from tuna_peft.evaluation.results import PromptResult

DATA = Path(__file__).parents[4] / "shared" / "data" / "lmentry"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/lmentry")


def write(folder, task, examples, made=None):
    templates = ["a", "b", "c"]
    settings = {"num_examples_per_template": (made or len(examples)) // 3, "input_templates": templates}
    folder.mkdir(exist_ok=True)
    (folder / f"{task}.json").write_text(json.dumps({"settings": settings, "examples": examples}))


def numbers(count=6):
    return {
        str(i): {"input": f"{i} or 50?", "metadata": {"answer": 50, "distractor": i, "n1": i, "n2": 50,
                                                      "answer_index": i % 2, "template_id": i % 3}}
        for i in range(count)
    }  # fmt: skip


def test_what_is_missing_or_broken_is_named_and_the_rest_counts(tmp_path):
    broken = {"x": {"input": "?", "metadata": {"template_id": 0}}, "y": {"metadata": {}}}
    write(tmp_path, "bigger_number", {**numbers(), **broken}, made=30)
    (tmp_path / "smaller_number.json").write_text('{"examples": {"1"')
    (tmp_path / "first_word.json").write_text("[]")
    questions, left_out = read_lmentry(tmp_path, RAW, ["bigger_number", "smaller_number", "first_word", "last_word"])
    assert [question.id for question in questions] == [f"bigger_number/{i}" for i in (*range(6), "x")]
    by_reason = {one.reason: (one.count, one.names) for one in left_out}
    assert by_reason["the file is missing"] == (1, ["last_word.json"])
    assert by_reason["the file cannot be read (JSONDecodeError)"] == (1, ["smaller_number.json"])
    assert by_reason["the file holds no JSON object"] == (1, ["first_word.json"])
    assert by_reason["the example has no input or no template_id"] == (1, ["bigger_number/y"])
    assert by_reason["examples are missing: the file is partial"] == (22, ["bigger_number.json (8 of 30)"])
    result = evaluate_lmentry(Scripted(lambda question: "50"), questions, max_new_tokens=5, excluded=left_out)
    assert result.metrics["accuracy"].value == 100 and len(result.prompts) == 6
    assert (result.excluded[-1].reason, result.excluded[-1].names) == (
        "the example lacks what its rule needs", ["bigger_number/x"]
    )  # fmt: skip


def test_nothing_usable_and_unknown_tasks_are_errors(tmp_path):
    with pytest.raises(UserError, match="no example can be used .the file is missing: sentence_containing.json"):
        read_lmentry(tmp_path, RAW)
    with pytest.raises(UserError, match="LMentry has no task biggest_number"):
        read_lmentry(tmp_path, RAW, ["biggest_number"])


def test_accuracy_is_the_mean_over_tasks_and_the_score_needs_all(tmp_path):
    write(tmp_path, "bigger_number", numbers(6))
    write(tmp_path, "smaller_number", numbers(3))
    questions, left_out = read_lmentry(tmp_path, RAW, ["bigger_number", "smaller_number"])
    right = {"bigger_number/0", "bigger_number/1", "bigger_number/2", "smaller_number/0"}
    result = evaluate_lmentry(
        Scripted(lambda question: "50" if question.id in right else "nothing"), questions, max_new_tokens=5,
        excluded=left_out,
    )  # fmt: skip
    assert result.metrics["accuracy"].value == pytest.approx((50 + 100 / 3) / 2)
    assert result.groups["task: bigger_number"]["accuracy"].value == 50
    weighted = sum(prompt.weight * prompt.scores["accuracy"] for prompt in result.prompts)
    assert weighted / sum(prompt.weight for prompt in result.prompts) == pytest.approx(
        result.metrics["accuracy"].value
    )
    assert result.metrics["lmentry_score"].value is None and result.metrics["robustness"].value is None
    assert result.metrics["robustness_adjacent_tasks"].value == pytest.approx(100 - (50 - 100 / 3))


def test_robustness_by_hand():
    def prompts(scores):
        return [
            PromptResult(str(i), "", "", {"accuracy": score}, details={"template": i % 3, "place": i % 2})
            for i, score in enumerate(scores)
        ]

    scored = {task: Scored.of(prompts([100.0] * 6)) for task in TASKS}
    assert [metric.value for metric in robustness(scored).values()] == [100] * 4
    scored["more_letters"] = Scored.of(
        prompts([100.0, 0.0, 100.0, 0.0, 100.0, 0.0])
    )  # right where the answer is first
    scored["more_letters_length_diff_1"] = Scored.of(prompts([100.0] * 3 + [0.0] * 3))
    found = {name: metric.value for name, metric in robustness(scored).items()}
    assert found["robustness_argument_order"] == pytest.approx(100 - 100 / 7)
    assert found["robustness_argument_content"] == pytest.approx(100 - 50 / 6)
    assert found["robustness_template"] == 100  # one of two is right in each template
    assert found["robustness_adjacent_tasks"] == pytest.approx(100 - 50 / 17)


@needs_data
def test_perfect_answers_to_all_41_files():
    questions, left_out = read_lmentry(DATA, RAW, per_template=5)
    assert {question.group for question in questions} == set(TASKS) == {*RULES, *VARIANTS}
    assert {one.reason for one in left_out} == {"examples are missing: the file is partial"}
    result = evaluate_lmentry(Scripted(perfect), questions, max_new_tokens=5)
    assert not [prompt.id for prompt in result.prompts if prompt.scores["accuracy"] != 100]
    assert all(result.metrics[name].value == 100 for name in ("accuracy", "robustness", "lmentry_score"))


def perfect(question):
    about, task = question.record, question.group
    if "answer" in about:
        return str(about["answer"])
    if task.startswith("any_words"):
        return "yes" if about["num_words"] > about["num_distractors"] else "no"
    if task.startswith("all_words"):
        return "no" if about["num_distractors"] else "yes"
    letter = about.get("letter")
    return {
        "sentence_containing": f"They saw {about.get('word')} today.",
        "sentence_not_containing": "Zebras zigzag.",
        "starts_with_word": f"{about.get('word')} went home.",
        "ends_with_word": f"They saw {about.get('word')}.",
        "word_containing": f"b{letter}c",
        "word_not_containing": "zzzz" if letter != "z" else "aaaa",
        "starts_with_letter": f"{letter}bc",
        "ends_with_letter": f"bc{letter}",
    }[task]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_so_many_examples_of_each_template(tmp_path, most):
    write(tmp_path, "bigger_number", numbers(9))
    questions, _ = read_lmentry(tmp_path, RAW, ["bigger_number"], most)
    assert [question.id for question in questions] == [f"bigger_number/{i}" for i in range(3 * most)]
