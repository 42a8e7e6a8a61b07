import numpy as np
import pytest
from run_folder import ranking

from tuna_peft.evaluation.report.distributions import by_rank
from tuna_peft.evaluation.report.svg import Chart, padded, short, ticks
from tuna_peft.evaluation.report.table import metric_cell, stage_table, verdict
from tuna_peft.evaluation.results import number


def test_distributions_of_v_by_rank():
    result = ranking(2)
    found = by_rank({"base": ranking(0), "stage": result})["stage"]
    for rank, entry in enumerate(found):
        v = [prompt.details["v"][rank] for prompt in result.prompts]
        lead = [prompt.details["v"][rank] - np.mean(prompt.details["v"]) for prompt in result.prompts]
        assert entry["rank"] == rank and entry["count"] == len(v) and entry["mean_v"] == pytest.approx(np.mean(v))
        assert entry["quantiles"]["0.5"] == pytest.approx(np.median(lead))
        grid, density = zip(*entry["density"], strict=True)
        mass = sum(density) * (grid[1] - grid[0])
        assert 0.9 < mass < 1.01  # the tails are cut off
        assert abs(grid[int(np.argmax(density))] - np.median(lead)) < 0.5


def test_distributions_share_a_grid_and_survive_equal_values():
    flat = ranking(0)
    for prompt in flat.prompts:
        prompt.details = {"v": [-1.0, -1.0], "ranks": [0, 0], "lengths": [1, 1]}  # all tied
    found = by_rank({"flat": flat, "other": ranking(1)})
    assert [len(found[stage]) for stage in found] == [1, 4]
    grids = [[v for v, _ in entry["density"]] for ranks in found.values() for entry in ranks]
    assert all(grid == grids[0] for grid in grids)
    assert np.isfinite([d for _, d in found["flat"][0]["density"]]).all()
    assert by_rank({}) == {}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3.2, 0.4, [-3, -2, -1, 0]), (5, 120, [50, 100]), (2, 2, [2])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_scales_and_padding():
    chart = Chart("x", width=100, height=100, left=10, right=10, top=0, bottom=20)
    x, y = chart.x(0, 2), chart.y(0, 1)
    assert (x(0), x(2), y(0), y(1)) == (10, 90, 80, 0)
    low, high = padded([0.5])
    assert low < 0.5 < high and padded([0, 0]) == (-1, 1)
    assert (short(-2.5), short(0.0002), short(100000)) == ("−2.5", "2e-4", "1e5")


def test_the_table_says_what_helped():
    change = {"value": 0.1, "low": 0.02, "high": 0.2}
    assert verdict(change) == "better" and verdict({**change, "low": -0.01}) == "unclear"
    assert verdict({"value": -0.1, "low": -0.2, "high": -0.05}) == "worse"
    metric = {"value": 41.25, "low": 40.0, "high": 42.5, "count": 3}
    result = {"main": "rougeL", "metrics": {"rougeL": metric}}
    report = {
        "evaluation": {"base": {"superni": result}, "sft": {}},
        "stages": {"sft": {"steps": 1200, "seconds": None}},
        "changes": {},
    }
    headings, rows = stage_table(report)
    assert headings == ["superni rougeL", "steps"]
    assert [(stage, [cell.text for cell in cells]) for stage, cells in rows] == [
        ("base", ["41.2", ""]),
        ("sft", ["", "1,200"]),
    ]
    assert rows[0][1][0].interval == "40.0 to 42.5" and number(None) == "–"
    metric["value"], metric["low"] = 0.9, 0.05
    assert metric_cell(metric).text == "0.9" and metric_cell(metric).interval == "0.1 to 42.5"  # one precision
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "count": 3, "percent": True}
    assert metric_cell(nothing).text == "0.0" and metric_cell(nothing).interval == "0.0 to 0.0"
