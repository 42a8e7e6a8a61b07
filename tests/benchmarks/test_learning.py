"""The contest: its data do not overlap, its arms compute what they are called, its runs go on where they stopped."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rounding import logps_bound

from benchmarks import learning  # noqa: E402
from benchmarks.contest import data, pairs, table  # noqa: E402
from benchmarks.contest.arms import ARMS, GRADE_PER_STEP, on_lists  # noqa: E402
from benchmarks.contest.objectives import ranking  # noqa: E402
from benchmarks.contest.train import LORA, trained  # noqa: E402
from benchmarks.contest.worlds import MAX_LENGTH, stories  # noqa: E402
from tuna_peft.models.base.load import load_base  # noqa: E402

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def base():
    return load_base("builtin:pico-llama", device="cpu")


@pytest.fixture(scope="module")
def lists(base):
    return data.training_lists(base.tokenizer)


def test_no_prompt_is_in_two_parts(base, lists):
    prompts = [
        {tuple(row["prompt_ids"]) for row in rows}
        for rows in (lists, data.validation(base.tokenizer).ranked, data.test(base.tokenizer).ranked)
    ]
    assert [len(part) for part in prompts] == [data.TRAINING_LISTS, data.VALIDATION_LISTS, 210]
    assert not any(a & b for a, b in itertools.combinations(prompts, 2))
    assert {any(row["completion_skips"]) for row in lists} == {False}  # pairs are made of whole responses


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_a_small_real_model_on_real_rankings():
    world = stories(SHARED)
    parts = [world.lists, world.validation.ranked, world.test.ranked]
    # The published runs had 336 lists: the two responses of one are equal once they are truncated, and now merge.
    assert world.start.num_parameters() == 260_032 and [len(part) for part in parts] == [335, 48, 93]
    for row in itertools.chain(*parts):
        assert len(row["completions_ids"]) > 1 and row["ranks"] == sorted(row["ranks"])
        assert max(map(len, row["completions_ids"])) + len(row["prompt_ids"]) <= MAX_LENGTH
    prompts = [{tuple(row["prompt_ids"]) for row in part} for part in parts]
    assert {bool(a & b) for a, b in itertools.combinations(prompts, 2)} == {False}


def test_lists_are_sorted_but_for_the_judge_s_errors_and_grades_have_the_stated_scale(lists):
    leads, steps = [], []
    for row in lists:
        for (a, rank_a), (b, rank_b) in itertools.combinations(zip(row["scores"], row["ranks"], strict=True), 2):
            if rank_a != rank_b:
                leads.append(abs(a - b))
                steps.append(abs(rank_a - rank_b))
    assert statistics.mean(leads) / statistics.mean(steps) == pytest.approx(GRADE_PER_STEP, abs=0.005)


def test_every_arm_trains(base, lists):
    rows = sorted(lists, key=lambda row: len(row["prompt_ids"]))[:2]
    for name, arm in ARMS.items():
        torch.manual_seed(0)
        model = get_peft_model(load_base("builtin:pico-llama", device="cpu").model, LoraConfig(**LORA))
        loss = arm.objective(model)(rows)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert torch.isfinite(loss) and sum(gradient.abs().sum() for gradient in gradients) > 0, name


def test_simpo_of_trl_is_our_logistic_loss_on_a_pair(base, lists):
    rows = [
        {**row, **{key: [row[key][0], row[key][-1]] for key in ("completions_ids", "completion_skips", "scores")},
         "ranks": [0, 1]}
        for row in lists[:3]
    ]  # fmt: skip
    ours = on_lists(ranking(loss_type="logistic", beta=2.0, margin=0.5), mle_weight=0.0)(base.model)(rows)
    theirs = pairs.simpo(beta=2.0, gamma=1.0)(base.model)(rows)
    # Two scores of a pair, times beta.
    torch.testing.assert_close(ours, theirs, atol=2 * 2 * logps_bound(base.model), rtol=0)


def test_a_run_depends_on_its_seed_alone_and_leaves_the_start_as_it_was(base, lists):
    before = base.model.model.layers[0].mlp.up_proj.weight.clone()
    settings = {"steps": 2, "batch": 2, "learning_rate": 1e-3}
    first, again, other = (
        trained(base.model, ARMS["tuna"].objective, lists, seed=seed, **settings)[1] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(before, base.model.model.layers[0].mlp.up_proj.weight)


def test_runs_are_kept_and_not_repeated(tmp_path, monkeypatch):
    file, calls = tmp_path / "runs.jsonl", []

    def fake_training(start, objective, lists, **settings):
        calls.append(settings)
        return settings, 0.5

    def fake_measure(model, tokenizer, split):
        rate = model["learning_rate"] if model else 0
        return {"ranking_accuracy": 0.5 + (rate == 3e-3) / 10, "response_score": 0.5, "words": 4.0}

    monkeypatch.setattr(learning, "trained", fake_training)
    monkeypatch.setattr(learning, "measured", fake_measure)
    monkeypatch.setattr(learning, "flops_per_step", lambda *args: 1e9 if args[1] is ARMS["tuna"].objective else 5e8)
    world = SimpleNamespace(start=None, tokenizer=None, lists=[], validation=None, test=None)
    learning.Contest(world, file, 2, 40).run("compute", ("best-sft",))
    assert [call["seed"] for call in calls] == [learning.GRID_SEED] * 3 + [0, 1]
    assert [call["learning_rate"] for call in calls[3:]] == [3e-3] * 2  # the best of the grid
    assert {call["steps"] for call in calls} == {80}  # half the FLOPs a step: twice the steps
    lines = file.read_text()
    file.write_text(lines[:-10])  # cut off by a crash
    learning.Contest(world, file, 2, 40).run("compute", ("best-sft",))
    assert len(calls) == 6 and calls[-1]["seed"] == 1
    assert [json.loads(line) for line in lines.splitlines()] == learning.read(file)
    learning.save_figure(learning.read(file), tmp_path / "figure.svg")
    assert "best-sft" in (tmp_path / "figure.svg").read_text()
    text = table.markdown(learning.read(file), "compute")
    assert "| SFT on the best of each list | 0.600 ± 0.000 | 0.500 ± 0.000 | 4.0 | 80 | 0.04 | 0.003 | 2 |" in text
