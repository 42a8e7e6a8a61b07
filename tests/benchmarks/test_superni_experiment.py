"""The experiment on a real model, on pico-LLaMA: sets do not overlap, runs resume, verdicts follow the protocol."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.learning import read
from benchmarks.superni import __main__ as command
from benchmarks.superni import analysis, arms, lists
from benchmarks.superni.prepare import Prepared
from benchmarks.superni.rows import best_rate, leader, next_rate
from benchmarks.superni.runs import Runs
from benchmarks.superni.sets import deal, read_instances
from benchmarks.superni.sizes import CUT, Sizes
from benchmarks.superni.tables import markdown
from tuna_peft.models.base.load import resolve_model_path
from tuna_peft.recipe.train_fields import check_train

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n### Response:\n"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """pico-LLaMA with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "pico-chat"
    shutil.copytree(resolve_model_path("builtin:pico-llama"), folder, ignore=shutil.ignore_patterns("data"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """pico's tasks as Super-NI's: the last two are test tasks, the others training tasks of 20 instances."""
    folder = tmp_path_factory.mktemp("data")
    by_task = defaultdict(list)
    prompts = Path(resolve_model_path("builtin:pico-llama"), "data", "prompts.jsonl").read_text().splitlines()
    for record in map(json.loads, prompts):
        by_task[record["family"]].append(
            {"task": record["family"], "category": "pico", "id": record["id"], "definition": [record["instruction"]],
             "input": record["input"] or "none", "output": [record["output"]], "positive_examples": []}
        )  # fmt: skip
    names = sorted(by_task)
    (folder / "superni").mkdir()
    for part, chosen in (("train", names[:-2]), ("test", names[-2:])):
        lines = [json.dumps(record) for name in chosen for record in by_task[name][:20]]
        (folder / "superni" / f"{part}_instances.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def work(model, data, tmp_path_factory):
    """Prepared with the cut sizes, and with teachers."""
    folder = tmp_path_factory.mktemp("work")
    options = ["--work", str(folder), "--data", str(data), "--model", model, "--quantization", "none", "--size", "cut"]
    assert command.main(["prepare", *options]) == 0
    assert command.main(["teachers", "--work", str(folder)]) == 0
    return folder


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_no_instance_is_in_two_sets_and_the_order_of_the_file_does_not_matter(model, data):
    tokenizer = AutoTokenizer.from_pretrained(model)
    train, test = read_instances(data / "superni")
    sets = deal(train, test, tokenizer, Sizes())
    again = deal(train[::-1], test[::-1], tokenizer, Sizes())
    ids = [record["id"] for records in sets.values() for record in records]
    texts = {record["instruction"] for records in sets.values() for record in records}
    assert len(ids) == len(set(ids)) == len(texts)
    assert {name: len(records) for name, records in sets.items()} == {
        "seen": 52, "validation": 13, "agreement": 13, "contextual": 26, "probabilistic": 13, "sft": 13, "unseen": 40,
    }  # fmt: skip
    assert {name: {r["id"] for r in records} for name, records in again.items()} == {
        name: {r["id"] for r in records} for name, records in sets.items()
    }
    assert not {r["task"] for r in sets["unseen"]} & {r["task"] for r in sets["seen"]}


def test_a_text_that_occurs_twice_is_in_one_set_only(model, data):
    train, test = read_instances(data / "superni")
    copies = [{**record, "id": f"copy-{record['id']}"} for record in train]
    sets = deal(train + copies, test, AutoTokenizer.from_pretrained(model), Sizes())
    texts = [record["instruction"] for records in sets.values() for record in records]
    assert len(texts) == len(set(texts))


def test_lists_pairs_and_gold_are_of_the_same_prompts(work):
    ranked, pairs, gold = (lines(work / f"contextual-{name}.jsonl") for name in ("lists", "pairs", "gold"))
    assert ranked and [r["id"] for r in ranked] == [r["id"] for r in pairs] == [r["id"] for r in gold]
    for one, pair in zip(ranked, pairs, strict=True):
        assert one["scores"] == sorted(one["scores"], reverse=True)
        assert pair["completions"] == [one["completions"][0], one["completions"][-1]]
        assert pair["scores"][0] > pair["scores"][1]


def row(identity: str, completions: list[str]) -> dict:
    return {"id": identity, "completions": completions, "record": {"output": "one two three"}}


def test_agreement_counts_pairs_that_differ_in_grade():
    rows = [row("a", ["one two three", "one two", "four"]), row("b", ["five", "six"])]
    right = {"one two three": -0.1, "one two": -0.2, "four": -0.3}
    found = lists.agreement({"a": right, "b": {"five": -1.0, "six": -2.0}}, rows)
    assert (found.share.value, found.share.count, found.prompts) == (1.0, 3, 1)
    swapped = lists.agreement({"a": {**right, "one two": -0.4}}, rows)
    assert swapped.share.value == pytest.approx(2 / 3)


def test_teachers_below_the_limit_make_no_lists(work, monkeypatch, capsys):
    monkeypatch.setattr(lists, "LEAST_AGREEMENT", 1.01)
    before = (work / "teachers.json").read_text()
    assert command.main(["teachers", "--work", str(work)]) == 0
    assert "none is good enough; lists: 0" in capsys.readouterr().out
    (work / "teachers.json").write_text(before)


@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_is_a_valid_recipe(name, work, data):
    runs = Runs(Prepared.read(work), data)
    for index, stage in enumerate(arms.ARMS[name].stages):
        made_in_time = stage.data in ("probabilistic-lists", arms.OWN_LISTS)
        stage = replace(stage, data=arms.LISTS if made_in_time else stage.data)
        section = runs._stage(index, 1e-3, stage)
        assert runs.recipe([section], 0).stages[0].name == f"stage{index}"
        assert check_train(stage.type, section["train"]) == []


def test_equal_flops(work, data):
    runs = Runs(replace(Prepared.read(work), sizes=replace(CUT, epochs=40)), data)
    [reference], [raft] = (arms.ARMS[name].stages for name in (arms.REFERENCE_ARM, arms.RAFT))
    passes = 40 * len(lines(work / "contextual-lists.jsonl")) / CUT.batch
    for stage in (reference, raft, replace(reference, rounds=2), replace(reference, reference_passes=1)):
        spent = runs.steps(stage) * stage.rounds * runs.flops(stage)
        rounding = 0.5 * stage.rounds * runs.flops(stage)  # steps are whole
        assert abs(spent - passes * runs.flops(reference)) <= 1.001 * rounding
    assert runs.flops(raft) < runs.flops(reference) < runs.flops(replace(reference, reference_passes=1))


def test_runs_end_to_end_and_are_not_repeated(work, data, monkeypatch, capsys):
    names = [arms.RAFT, arms.REFERENCE_ARM, "two-rounds", "few-gold", "few-gold-own-tuna"]
    for name, arm in arms.ARMS.items():
        monkeypatch.setitem(arms.ARMS, name, replace(arm, decides=name in names[:2]))
    options = ["run", "--work", str(work), "--data", str(data), "--arms", *names]
    assert command.main(options) == 0
    rows = read(work / "rows.jsonl")
    found = [(row["what"], row["arm"], row["seed"]) for row in rows]
    assert found[:5] == [
        ("held-out", "base", 0), ("validation", "raft", 0), ("held-out", "raft", 0),
        ("validation", "tuna-best", 0), ("held-out", "tuna-best", 0),
    ]  # fmt: skip
    assert ("held-out", "raft", 1) in found and ("held-out", "two-rounds", 0) in found
    assert ("validation", "two-rounds", 1) not in found
    text = capsys.readouterr().out
    assert "Tuna, likelihood on the best, two rounds" in text and "| SFT on the best sample (RAFT) | base |" in text
    [base] = [row for row in rows if row["arm"] == "base"]
    assert base["kl"] == 0 and all(row["kl"] > 0 for row in rows if row["what"] == "held-out" and row is not base)

    monkeypatch.setattr("benchmarks.superni.runs.run_recipe", lambda *args: pytest.fail("a run was repeated"))
    assert command.main(options) == 0
    assert read(work / "rows.jsonl") == rows
    assert Runs(Prepared.read(work), data).rows == rows
    grid = replace(Prepared.read(work), sizes=replace(CUT, rates=(1e-4, 1e-3), seeds=1))
    assert Runs(grid, data).rows == rows  # a larger grid repeats no run
    other = replace(Prepared.read(work), sizes=replace(CUT, epochs=2))
    assert Runs(other, data).rows == []  # results of other sizes do not count


def test_an_arm_whose_rate_another_arm_has_found_waits_for_it(work, data, monkeypatch):
    runs, done = Runs(Prepared.read(work), data), []

    def train(name, rate, seed, *, measure=False):
        done.append((name, measure))
        runs.rows.append(validated(name, 20.0, rate))

    runs.rows = []
    monkeypatch.setattr(runs, "_trained", train)
    runs._search("few-gold-tuna-best")
    names = ("few-gold", "few-gold-tuna-best")
    assert done == [(name, measure) for name in names for measure in (False, True)]
    # An arm without a rate of its own would be one run for every rate of the grid.
    assert {arm.stages[-1].rate_of for arm in arms.ARMS.values()} == {None}


# The analysis, on rows made by hand


def measured(arm: str, by_task: dict[str, list[float]], seed: int = 0, rate: float | None = 1e-3) -> dict:
    scores = {task: [[value, 0.0, 3.0, 1.0] for value in values] for task, values in by_task.items()}
    key = {"arm": arm, "seed": seed, "rate": None if arm == "base" else rate, "hash": f"{arm}-{seed}-{rate}"}
    return {"what": "held-out", **key, "seen": scores, "unseen": scores, "kl": 0.1}


def validated(arm: str, value: float, rate: float = 1e-3, seed: int = 0) -> dict:
    scores = {"task": [[value, 0.0, 3.0, 1.0]]}
    common = {"steps": [3], "seconds": 1.0, "peak_gib": 1.0}
    return {"what": "validation", "arm": arm, "seed": seed, "rate": rate, "scores": scores, **common}


def tasks(*means: float) -> dict[str, list[float]]:
    """Two instances a task with these means."""
    return {f"task{index}": [mean - 1, mean + 1] for index, mean in enumerate(means)}


def test_an_estimate_is_the_mean_of_the_tasks_means():
    found = analysis.estimate({"a": analysis.np.array([0.0, 10.0, 20.0]), "b": analysis.np.array([30.0])})
    assert (found.value, found.tasks, found.instances) == (20.0, 2, 4)
    assert (found.low, found.high) == (10.0, 30.0)  # resamples of two tasks: aa, ab, bb


def test_a_difference_is_paired_and_averaged_over_seeds():
    base = [measured("base", tasks(10, 90))]
    arm = [measured("raft", tasks(11, 93), seed) for seed in (0, 1)] + [measured("raft", tasks(14, 90), 2)]
    found = analysis.difference(arm, base, "seen")
    assert found.value == pytest.approx(
        (2 + 2) / 2
    )  # the first task gains (1 + 1 + 4) / 3, the second (3 + 3 + 0) / 3
    assert found.low == found.high == pytest.approx(2.0)
    with pytest.raises(ValueError, match="different instances"):
        analysis.difference(arm, [measured("base", tasks(10, 90, 50))], "seen")


def test_holm():
    assert analysis.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert analysis.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert analysis.holm([]) == []


@pytest.mark.parametrize(
    ("value", "low", "high", "p", "expected"),
    [
        (3.0, 1.0, 5.0, 0.01, "win"),
        (0.5, 0.1, 0.9, 0.01, "win"),
        (-3.0, -5.0, -1.0, 0.01, "loss"),
        (0.5, -1.0, 2.0, 0.4, "no difference"),
        (0.5, -1.0, 2.1, 0.4, "undecided"),
        (3.0, 0.1, 5.9, 0.05, "undecided"),
    ],
)
def test_verdicts(value, low, high, p, expected):
    assert analysis.verdict(analysis.Estimate(value, low, high, p, 10, 20), p) == expected


def test_the_primary_family_is_fixed_before_its_arms_are_measured():
    rows = [measured("base", tasks(*range(20)))]
    better = tasks(*(mean + 5 + mean % 3 for mean in range(20)))
    rows += [validated("raft", 20.0), measured("raft", better)]
    [found] = analysis.compare(rows, "seen", primary=True)
    assert (found.arm, found.against, found.verdict) == ("raft", "base", "win")
    assert found.p == pytest.approx(found.difference.p * len(analysis.primary_pairs()))
    rows += [validated("tuna-best", 20.0), measured("tuna-best", better)]
    same = analysis.compare(rows, "seen", primary=True)[1]
    assert (same.arm, same.against, same.verdict, same.p) == ("tuna-best", "raft", "no difference", 1.0)
    assert [(one.arm, one.against) for one in analysis.compare(rows, "seen", primary=False)] == [("tuna-best", "base")]
    text = markdown(rows)
    assert re.search(r"\| SFT on the best sample \(RAFT\) \| base \| \+\d\.\d \[\+.*\] \| <0\.001 \| win \|", text)
    assert re.search(r"likelihood on the best \| base \|.*\| win \(exploratory\) \|", text)


def test_a_second_stage_is_compared_with_its_first_stage_alone():
    names = ("base", "few-gold", "few-gold-raft")
    rows = [validated(name, 20.0) for name in names[1:]]
    rows += [measured(name, tasks(index, index + 2)) for index, name in enumerate(names)]
    found = {(one.arm, one.against): one.difference.value for one in analysis.compare(rows, "seen", primary=False)}
    assert found[("few-gold-raft", "few-gold")] == 1.0 and found[("few-gold-raft", "base")] == 2.0


def test_only_the_run_with_the_best_rate_on_validation_counts():
    rows = [validated("raft", 20.0, 1e-4), validated("raft", 22.0, 1e-3), validated("raft", 30.0, 1e-4, seed=1)]
    rows += [measured("raft", tasks(1), rate=1e-4), measured("raft", tasks(5), rate=1e-3)]
    assert best_rate(rows, "raft") == 1e-3
    assert analysis.by_seed(rows, "raft", "seen") == [5.0]


def test_the_grid_is_extended_once_where_the_best_rate_is_at_its_end():
    rows: list[dict] = []
    for rate, value in ((1e-4, 20.0), (3e-4, 21.0), (1e-3, 22.0)):
        assert next_rate(rows, "raft", Sizes()) == rate
        rows.append(validated("raft", value, rate))
    assert next_rate(rows, "raft", Sizes()) == 3e-3
    assert next_rate([*rows, validated("raft", 23.0, 3e-3)], "raft", Sizes()) is None
    assert next_rate([*rows[:2], validated("raft", 20.5, 1e-3)], "raft", Sizes()) is None
    assert next_rate([validated("raft", 23.0, 1e-4), *rows[1:]], "raft", Sizes()) == 3e-5


def test_the_leader_is_a_deciding_arm_that_ranks_and_waits_for_all_of_them():
    names = [name for name, arm in arms.ARMS.items() if arm.decides and arm.ranks]
    rows = [validated("raft", 90.0), validated("tuna", 80.0)]
    rows += [validated(name, 20.0 + index) for index, name in enumerate(names)]
    assert leader(rows) == names[-1]
    assert leader(rows[:-1]) is None
