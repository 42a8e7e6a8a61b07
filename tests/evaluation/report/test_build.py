import json

import pytest
from run_folder import STAGES, facts, graded, ranking, write, write_run

from tuna_peft.errors import UserError
from tuna_peft.evaluation.report.build import build_report
from tuna_peft.evaluation.report.write import write_report
from tuna_peft.evaluation.results import save_result


def test_every_number_of_the_results_is_in_the_report(run_folder):
    report = build_report(run_folder)
    assert list(report["evaluation"]) == ["base", *STAGES]
    for number, stage in enumerate(report["evaluation"]):
        for result in (ranking(number), graded(number)):
            found = dict(report["evaluation"][stage][result.task])
            own = [len(prompt.response) for prompt in result.prompts] if result.task == "graded" else None
            assert found.pop("answer_length") == (own and sum(own) / len(own))
            assert found == result.summary()
    assert report["stages"]["sft"]["seconds"] == 39.5 and report["seed"] == 3
    assert "stages" not in report["base"] and report["recipe"].startswith("name:")
    assert report["curves"]["sft"]["loss"]["loss"][0] == [5, pytest.approx(2.0 / 5**0.3)]
    assert list(report["curves"]["contextual"]["v by rank"]) == [f"scores/rank_{rank}" for rank in range(4)]


def test_the_same_numbers_are_written_as_json(run_folder):
    report = write_report(run_folder)
    assert json.loads((run_folder / "report.json").read_text()) == report
    assert (run_folder / "report.html").exists() and (run_folder / "report.md").exists()
    assert write_report(run_folder) == report


def test_changes_are_paired_by_prompt(run_folder):
    first, second = graded(1), graded(2)
    second.prompts = second.prompts[::-1][:30]  # another order, and some are missing
    save_result(run_folder, "probabilistic", second)
    change = build_report(run_folder)["changes"]["probabilistic"]["graded"]
    before = {prompt.id: prompt.scores["score"] for prompt in first.prompts}
    differences = [prompt.scores["score"] - before[prompt.id] for prompt in second.prompts]
    assert change["value"] == pytest.approx(sum(differences) / 30) and change["count"] == 30
    assert change["against"] == "sft" and change["low"] <= change["value"] <= change["high"]


def test_a_run_that_is_not_finished_shows_what_there_is(tmp_path):
    report = build_report(write_run(tmp_path / "run", finished=1))
    assert list(report["evaluation"]) == ["base", "sft"]
    assert report["stages"]["probabilistic"] is None and report["exports"] == {}
    write(tmp_path / "bare/run.json", facts(["only"]))
    bare = build_report(tmp_path / "bare")
    assert bare["evaluation"] == {} and bare["samples"] == [] and bare["v_by_rank"] == {}


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder of a run or an evaluation"):
        build_report(tmp_path)


def test_samples_gained_lost_and_in_between(run_folder):
    last = graded(3)
    for prompt in last.prompts[5:7]:
        prompt.scores["score"] = -1.0
    save_result(run_folder, "contextual", last)
    samples = build_report(run_folder)["samples"]
    assert [sample["why"] for sample in samples] == ["gained"] * 3 + ["lost"] * 2 + ["typical"] * 3
    assert {sample["id"] for sample in samples[:3]} == {"g0", "g1", "g2"}
    assert {sample["id"] for sample in samples[3:5]} == {"g5", "g6"}
    assert len({sample["id"] for sample in samples}) == 8
    assert samples[-1]["responses"]["base"]["text"].startswith("answer 0")


def test_samples_by_name(run_folder):
    samples = build_report(run_folder, ["g7", "g2"])["samples"]
    assert [(sample["id"], sample["why"]) for sample in samples] == [("g7", "chosen"), ("g2", "chosen")]
    other = graded(3)
    other.task = "vicuna"
    for prompt in other.prompts:
        prompt.id = f"v{prompt.id}"
    save_result(run_folder, "contextual", other)
    assert [sample["task"] for sample in build_report(run_folder, ["vg7"])["samples"]] == ["vicuna"]
    assert [sample["task"] for sample in build_report(run_folder, ["g7"])["samples"]] == ["graded"]
    with pytest.raises(UserError, match="no prompt 'nobody'.*\n?.*") as error:
        build_report(run_folder, ["nobody"])
    assert "g0, g1, g2" in str(error.value)
