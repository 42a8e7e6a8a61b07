import re
from xml.etree import ElementTree

import numpy as np
import pytest
from run_folder import ranking

from tuna_peft.evaluation.report.curves import draw_curves, read_curves, save_curves
from tuna_peft.evaluation.report.distributions import by_rank
from tuna_peft.evaluation.report.table import metric_cell, stage_table, verdict
from tuna_peft.evaluation.report.theme import LIGHT, mix, new_axes, style, svg
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
    assert grids == [grids[0]] * 5
    assert np.isfinite([d for _, d in found["flat"][0]["density"]]).all()
    assert by_rank({}) == {}


def test_a_drawing_follows_the_page_and_keeps_its_text():
    name = '#0f6e84 1.2345 <b> "q" $x$ & \u4f60'

    def draw():
        with style():
            axes = new_axes(300, 80)
            axes.plot([0, 1], [0, 1], "o-", color=LIGHT["accent"])
            axes.plot([0, 1], [1, 0], color=mix("best", "worst", 1 / 3))
            axes.set_xticks([0], [name])
            return svg(axes, name)

    first = draw()
    assert first == draw()  # no date, no random ids
    root = ElementTree.fromstring(first)
    assert root.attrib["viewBox"] == "0 0 300 80" and root.attrib["aria-label"] == name
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert texts.count(name) == 1  # neither rounded nor recolored nor read as a formula
    styles = " ".join(element.attrib.get("style", "") for element in root.iter())
    assert "var(--accent)" in styles and "color-mix(in srgb, var(--worst) 33%, var(--best))" in styles
    assert not re.search("#[0-9a-f]{6}", styles) and "font-family" not in first and "url(" not in first
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    used = {value[1:] for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")}
    assert ids == used != set()  # the marker


def test_mixed_colors():
    assert (mix("best", "worst", 0), mix("best", "worst", 1)) == (LIGHT["best"], LIGHT["worst"])
    low, middle, high = (int(mix("quiet", "accent", share)[1:3], 16) for share in (0.25, 0.5, 0.75))
    assert low > middle > high and len(set(LIGHT.values())) == len(LIGHT)


@pytest.mark.parametrize("log", [[], [{"step": 3, "train_runtime": 1.0}]])
def test_no_curves_without_numbers(tmp_path, log):
    assert read_curves(log) == {} and not save_curves(log, tmp_path / "curves.png") and not list(tmp_path.iterdir())


def test_one_logged_step_is_drawn(tmp_path):
    assert save_curves([{"step": 3, "loss": 1.0}], tmp_path / "curves.png", title="$run")
    [file] = tmp_path.iterdir()
    assert file.read_bytes().startswith(b"\x89PNG")
    with style():
        axes = new_axes(100, 80)
        draw_curves(axes, read_curves([{"step": 3, "loss": 1.0}])["loss"])
        assert "<use" in svg(axes, "one point")  # as a marker


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
        "curves": {},
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
