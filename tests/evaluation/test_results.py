"""Results survive the disk; intervals mean what they say."""

import numpy as np
import pytest

from tuna_peft.errors import UserError
from tuna_peft.evaluation.bootstrap import mean_metric, paired_difference
from tuna_peft.evaluation.results import (
    Exclusion,
    Metric,
    PromptResult,
    TaskResult,
    load_result,
    load_results,
    save_result,
)


def result(task="ranking"):
    return TaskResult(
        task, "pair_accuracy", {"pair_accuracy": Metric(0.5, 0.25, 0.75, 12)},
        [PromptResult("a", "p", "r", {"pair_accuracy": 0.5, "tau": None}, 3, ["ref"], details={"v": [-1.0]})],
        groups={"g": {"pair_accuracy": Metric(None)}}, excluded=[Exclusion.of("why", map(str, range(30)))],
        settings={"margin": 0.1}, seconds=1.5,
    )  # fmt: skip


def test_a_result_comes_back_as_it_was(tmp_path):
    save_result(tmp_path, "base", result())
    assert load_result(tmp_path, "base", "ranking") == result()
    assert load_result(tmp_path, "base", "graded") is None
    assert result().excluded[0].count == 30 and len(result().excluded[0].names) == 20
    assert result().summary()["prompts"] == 1


def test_stages_come_in_order_and_the_journal_is_no_stage(tmp_path):
    for stage in ("sft", "base", "contextual"):
        save_result(tmp_path, stage, result())
    (tmp_path / "evaluation" / "journal.jsonl").touch()
    assert list(load_results(tmp_path)) == ["base", "contextual", "sft"]
    assert list(load_results(tmp_path, ["base", "sft", "probabilistic"])) == ["base", "sft"]


def test_a_broken_file_is_named(tmp_path):
    save_result(tmp_path, "base", result())
    (tmp_path / "evaluation" / "base" / "ranking.json").write_text('{"task": "ranking"}')
    with pytest.raises(UserError, match=r"base/ranking\.json: this is no evaluation result"):
        load_results(tmp_path)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        metric = mean_metric(draw.normal(3.0, 2.0, size=60).tolist())
        covered += metric.low <= 3.0 <= metric.high
    assert 88 <= covered <= 99


def test_weights_and_missing_scores():
    metric = mean_metric([1.0, 0.0, None, 0.5], [3, 1, 5, 0])
    assert (metric.value, metric.count) == (0.75, 4)
    assert mean_metric([None, None]) == Metric(None)
    assert mean_metric([1.0, 1.0]) == Metric(1.0, 1.0, 1.0, 2)


def test_a_paired_difference_sees_what_two_intervals_do_not():
    draw = np.random.default_rng(2)
    first = draw.normal(0, 1, size=50)
    second = first + 0.1
    assert mean_metric(first).high > mean_metric(second).low
    assert paired_difference(first, second, np.ones(50)).low == pytest.approx(0.1)
