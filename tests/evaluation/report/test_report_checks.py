"""What a report says about a run in words, on reports where right and wrong differ."""

from __future__ import annotations

import copy

import pytest

from tuna_peft.evaluation.report.build import build_report
from tuna_peft.evaluation.report.checks import FEW, checks, problems
from tuna_peft.evaluation.results import Metric, PromptResult, TaskResult, load_result, save_result


@pytest.fixture
def report(run_folder):
    return build_report(run_folder)


def interval(value, low, high, count=200):
    return {"value": value, "low": low, "high": high, "count": count, "percent": False}


def healthy(report):
    """The report with one ranking task, of which nothing is to be said."""
    report = copy.deepcopy(report)
    metrics = {
        "pair_accuracy": interval(0.7, 0.65, 0.75),
        "margin": interval(0.2, 0.1, 0.3),
        "prefers_longer": interval(0.5, 0.4, 0.6),
        "better_is_longer": interval(0.5, 0.4, 0.6),
    }
    result = {"task": "ranking", "main": "pair_accuracy", "metrics": metrics, "prompts": 200, "groups": {},
              "excluded": [], "answer_length": None}  # fmt: skip
    report["evaluation"] = {"base": {"ranking": copy.deepcopy(result)}, "contextual": {"ranking": result}}
    change = {"against": "base", **interval(0.1, 0.05, 0.15)}
    report["changes"] = {"contextual": {"ranking": change}}
    report["stages"] = {"contextual": {"steps": 20}}
    report["curves"] = {"contextual": {"loss": {"loss": [[1, 2.0], [20, 1.0]]}}}
    return report


def test_nothing_is_said_of_a_healthy_run(report):
    found = checks(healthy(report))
    assert len(found) == 5 and not problems(healthy(report))
    assert [check.value for check in found][:2] == ["2.000 to 1.000", "+0.100, 95 % interval +0.050 to +0.150"]


def test_a_loss_that_does_not_fall(report):
    """A held-out result that rose counts for more than the noise of one logged loss."""
    report = healthy(report)
    for last, low, said in (
        (1.999, -0.05, None),
        (2.0, -0.05, "did not fall (2.000 to 2.000 in 20 steps)"),
        (2.0, 0.05, None),
        (float("nan"), 0.05, "not finite"),
    ):
        report["curves"]["contextual"]["loss"]["loss"][-1][1] = last
        report["changes"]["contextual"]["ranking"]["low"] = low
        assert [said in problem for problem in problems(report)] == ([True] if said else [])


def test_worse_too_few_and_enough(report):
    report = healthy(report)
    change = report["changes"]["contextual"]["ranking"]
    for low, high, count, said in (
        (-0.10, -0.01, 30, "made the ranking accuracy worse"),
        (-0.05, 0.05, FEW - 1, "99 prompts are too few to tell whether contextual changed"),
        (-0.05, 0.05, FEW, None),
        (0.01, 0.05, 5, None),
    ):
        change.update(value=(low + high) / 2, low=low, high=high, count=count)
        assert [said in problem for problem in problems(report)] == ([True] if said else [])


def test_chance_and_below(report):
    report = healthy(report)
    metric = report["evaluation"]["contextual"]["ranking"]["metrics"]["pair_accuracy"]
    for value, low, high, said in (
        (0.55, 0.501, 0.6, None),
        (0.55, 0.5, 0.6, "no better than chance (0.5): 0.550 (0.500 to 0.600)"),
        (0.45, 0.4, 0.5, "no better than chance"),
        (0.55, 0.49, 0.61, "no better than chance (0.5): 0.550 (0.490 to 0.610)"),
        (0.4, 0.35, 0.45, "below chance"),
    ):
        metric.update(value=value, low=low, high=high)
        assert [said in problem for problem in problems(report)] == ([True] if said else [])
    # The base alone may be at chance: that is what training is for.
    metric.update(value=0.7, low=0.6, high=0.8)
    report["evaluation"]["base"]["ranking"]["metrics"]["pair_accuracy"].update(value=0.5, low=0.4, high=0.6)
    assert not problems(report)


def test_margin_and_a_preference_for_length(report):
    report = healthy(report)
    metrics = report["evaluation"]["contextual"]["ranking"]["metrics"]
    metrics["margin"]["value"] = -0.01
    metrics["prefers_longer"]["value"] = 0.66
    margin, length = problems(report)
    assert "worse responses are on average as likely as better ones" in margin
    assert "prefers the longer response in 66% of pairs; it is the better one in 50%" in length
    metrics["margin"]["value"], metrics["prefers_longer"]["value"] = 0.01, 0.64
    assert not problems(report)


def test_much_shorter_answers(run_folder):
    def answers(length):
        prompts = [PromptResult(f"a{i}", "p", "x" * length, {}) for i in range(3)]
        return TaskResult("answers", "characters", {"characters": Metric(float(length), count=3)}, prompts)

    save_result(run_folder, "base", answers(100))
    for length, said in ((51, False), (49, True)):
        save_result(run_folder, "contextual", answers(length))
        report = build_report(run_folder)
        found = [problem for problem in problems(report) if "much shorter" in problem and "(task answers)" in problem]
        assert bool(found) is said
    assert "100 characters of the base, 49 after contextual" in found[0]
    # Shorter is neither better nor worse: a length has no change to color.
    assert "answers" not in report["changes"].get("contextual", {})
    assert load_result(run_folder, "base", "answers").prompts[0].scores == {}
