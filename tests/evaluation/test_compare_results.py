"""Two results, paired by prompt."""

import pytest

from tuna_peft.evaluation.compare_results import compare_results
from tuna_peft.evaluation.results import Metric, PromptResult, TaskResult


def result(scores, **changes):
    prompts = [
        PromptResult(name, changes.get("text", "text ") + name, f"said {score}", {"m": score}, weight)
        for name, score, weight in scores
    ]
    return TaskResult("t", "m", {"m": Metric(None)}, prompts)


def test_wins_losses_ties_and_what_cannot_be_paired():
    first = result([("a", 0.0, 1), ("b", 1.0, 3), ("c", 0.5, 1), ("d", 1.0, 1), ("gone", 1.0, 1)])
    second = result([("b", 0.75, 3), ("a", 1.0, 1), ("c", 0.5, 1), ("d", None, 1), ("new", 0.0, 1), ("new2", 0.0, 1)])
    found = compare_results(first, second)
    assert [pairing.id for pairing in found.wins] == ["a"] and [pairing.id for pairing in found.losses] == ["b"]
    assert (found.ties, found.only_first, found.only_second, found.unscored) == (1, 1, 2, 1)
    assert found.wins[0].responses == ("said 0.0", "said 1.0") and found.wins[0].gain == 1
    assert found.values == pytest.approx(((0 + 3 + 0.5) / 5, (1 + 2.25 + 0.5) / 5))
    assert found.difference.value == pytest.approx((1 - 0.75) / 5)
    assert found.difference.low < found.difference.value < found.difference.high


def test_prompts_that_are_no_part_of_the_main_metric_are_not_compared():
    """The second result says which: the first may be of an earlier version, or of fewer tasks."""
    found = compare_results(result([("a", 0.0, 0), ("variant", 0.0, 1)]), result([("a", 1.0, 1), ("variant", 1.0, 0)]))
    assert [pairing.id for pairing in found.wins] == ["a"] and found.difference.count == 1
    assert compare_results(result([("v", 0.0, 0)]), result([("v", 1.0, 0)])).difference is None


def test_the_same_id_with_another_text_is_another_prompt():
    found = compare_results(result([("a", 0.0, 1)]), result([("a", 1.0, 1)], text="other "))
    assert (found.only_first, found.only_second, found.difference) == (1, 1, None)


def test_repeated_ids_are_told_apart():
    found = compare_results(result([("a", 0.0, 1), ("a", 1.0, 1)]), result([("a", 0.5, 1), ("a", 0.5, 1)]))
    assert len(found.wins) == len(found.losses) == 1 and found.difference.value == 0


def test_two_equal_runs():
    found = compare_results(result([("a", 0.3, 1), ("b", 0.7, 1)]), result([("a", 0.3, 1), ("b", 0.7, 1)]))
    assert (found.ties, found.difference.low, found.difference.high) == (2, 0, 0)
