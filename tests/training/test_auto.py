"""`margin: auto` and `learning_rate: auto`: numbers chosen before training."""

import logging
import statistics

import pytest
import torch
from families import make_rows
from tiny_trainer import config, stacked, trainer

from tuna_peft.data.collate import RankedCollator
from tuna_peft.models.forward.scoring import response_logps
from tuna_peft.training.learning_rate import auto_learning_rate


@pytest.mark.parametrize("by", ["rank", "score"])
def test_the_margin_is_the_median_difference_before_training(base_folder, tmp_path, by, caplog):
    rows = make_rows(9)
    for row in rows:
        row["scores"] = [-3.0 * rank**2 for rank in row["ranks"]]
    gaps = []
    model = stacked(base_folder, ("one", "second"))
    for row in rows:
        with torch.no_grad():
            v = response_logps(model, RankedCollator(0)([row])).normalised()[0].tolist()
        for i, rank in enumerate(row["ranks"]):
            for j, worse in enumerate(row["ranks"]):
                if rank < worse:
                    unit = worse - rank if by == "rank" else (row["scores"][i] - row["scores"][j]) / 2
                    gaps.append(abs(v[i] - v[j]) / unit)
    with caplog.at_level(logging.INFO, logger="tuna_peft"):
        run = trainer(stacked(base_folder, ("one", "second")), tmp_path, rows, margin="auto", margin_by=by,
                      score_scale=2.0, per_device_train_batch_size=4)  # fmt: skip
    assert run.args.margin == run._ranking_loss.margin == pytest.approx(statistics.median_low(gaps), rel=0.05)
    assert f"margin auto: {run.args.margin:g}" in caplog.text
    assert run.model.training and run.train().training_loss > 0


def test_a_resumed_training_has_the_margin_of_its_start(base_folder, tmp_path):
    def make():
        return trainer(stacked(base_folder), tmp_path, make_rows(8), margin="auto", max_steps=4, save_steps=2,
                       save_strategy="steps")  # fmt: skip

    straight = make()
    straight.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.args.margin == straight.args.margin
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_learning_rate_is_that_of_the_published_formula(base_folder, tmp_path, caplog):
    # From Tinker's cookbook, for LoRA and SFT.
    published = {256: 2.5e-3, 576: 1.3e-3, 2048: 4.9e-4, 4096: 2.9e-4}
    assert {width: auto_learning_rate(width, ranking=False) for width in published} == published
    for width in published:
        sft, ranking = (auto_learning_rate(width, ranking=ranking) for ranking in (False, True))
        assert sft > ranking > auto_learning_rate(width, ranking=True, log_ratios=True)
    with caplog.at_level(logging.INFO, logger="tuna_peft"):
        run = trainer(stacked(base_folder), tmp_path, make_rows(4), learning_rate="auto", lr_scheduler_type="constant")
    expected = auto_learning_rate(64, ranking=True)
    assert run.args.learning_rate == expected and f"learning_rate auto: {expected:g}" in caplog.text
    run.train()
    assert run.state.log_history[0]["learning_rate"] == expected


def test_other_words_are_refused(tmp_path):
    with pytest.raises((ValueError, TypeError), match="fast"):
        config(tmp_path, learning_rate="fast")
