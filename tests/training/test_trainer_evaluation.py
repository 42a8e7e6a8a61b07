"""`evaluate` and `predict` of `TunaTrainer`: metrics belong to one call, and the loss to the whole data set."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import make_model, make_rows
from rounding import logps_bound
from tiny_trainer import Tokens, config, stacked, trainer

from tuna_peft import TunaTrainer
from tuna_peft.data.collate import RankedCollator
from tuna_peft.models.forward.scoring import response_logps


def metrics_of(metrics, prefix):
    timing = ("runtime", "per_second", "preparation_time", "epoch")
    return {k.removeprefix(prefix): v for k, v in metrics.items() if not k.endswith(timing)}


def test_metrics_do_not_leak_into_other_evaluations(base_folder, tmp_path):
    good, bad = (Dataset.from_list(make_rows(6, seed=seed)) for seed in (0, 1))
    run = trainer(stacked(base_folder), tmp_path, make_rows(6))
    alone = metrics_of(run.evaluate(good), "eval_")
    other = metrics_of(run.evaluate(bad), "eval_")
    assert alone["ranking_accuracy"] != other["ranking_accuracy"]
    assert metrics_of(run.predict(bad).metrics, "test_") == other
    assert metrics_of(run.evaluate(bad, metric_key_prefix="train"), "train_") == other
    assert metrics_of(run.evaluate(good), "eval_") == alone
    both = run.evaluate({"good": good, "bad": bad})
    assert both["eval_good_ranking_accuracy"] == alone["ranking_accuracy"]
    assert both["eval_bad_ranking_accuracy"] == other["ranking_accuracy"]
    assert "eval_ranking_accuracy" not in both


def test_an_evaluation_that_fails_leaves_nothing_behind(base_folder, tmp_path, monkeypatch):
    run = trainer(stacked(base_folder), tmp_path, make_rows(6), per_device_eval_batch_size=2)
    expected = metrics_of(run.evaluate(), "eval_")
    with monkeypatch.context() as patch:
        calls = []

        def fail_later(model, batch):
            calls.append(batch)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return response_logps(model, batch)

        patch.setattr("tuna_peft.training.trainer.response_logps", fail_later)
        with pytest.raises(KeyboardInterrupt):
            run.evaluate()
    assert metrics_of(run.evaluate(), "eval_") == expected


def test_evaluating_during_training_does_not_change_what_training_logs(base_folder, tmp_path):
    logs = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        run = trainer(stacked(base_folder), tmp_path, make_rows(6), max_steps=4, logging_steps=3, **evaluation)
        run.train()
        training = [entry for entry in run.state.log_history if "loss" in entry or "train_loss" in entry]
        logs.append([metrics_of(entry, "") for entry in training])
    for entry in (*logs[0], *logs[1]):
        for timed in [key for key in entry if key.startswith("train_") and key != "train_loss"]:
            entry.pop(timed)
    assert logs[0] == logs[1]
    assert "ranking_accuracy" in logs[0][-1]  # of the step after the last regular log


@pytest.mark.parametrize("loss", [{}, {"reduction": "pair_sum", "mle_on": "best"}, {"loss_type": "list_mle"}])
def test_the_loss_of_ragged_lists_does_not_depend_on_the_batch_size(base_folder, tmp_path, loss):
    rows = make_rows(7)  # 2 to 4 responses, ties
    whole = trainer(stacked(base_folder), tmp_path, rows, **loss)
    [batch] = whole.data_collator(rows)["micro_batches"]
    expected = float(whole.compute_loss(whole.model.eval(), batch).detach())  # as one training step over all rows
    for size in (1, 2, 5):
        run = trainer(stacked(base_folder), tmp_path, rows, per_device_eval_batch_size=size, **loss)
        assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=0, abs=25 * logps_bound(run.model))


@pytest.mark.parametrize("budget", [None, 60])
def test_predictions_are_the_scores_in_the_order_of_the_rows(base_folder, tmp_path, budget):
    rows, seen = make_rows(7), []

    def compute_metrics(prediction):
        seen.append(prediction)
        first = np.argmax(prediction.predictions, axis=1)  # missing ones are far below every score
        return {"top_1": np.mean(np.take_along_axis(prediction.label_ids, first[:, None], 1) == 0)}

    data = Dataset.from_list(rows)
    run = TunaTrainer(
        stacked(base_folder), config(tmp_path, per_device_eval_batch_size=3, max_tokens_per_batch=budget),
        eval_dataset=data, processing_class=Tokens(), compute_metrics=compute_metrics,
    )  # fmt: skip
    metrics = run.evaluate()
    assert 0 <= metrics["eval_top_1"] <= 1 and len(seen) == 1
    output = run.predict(data)
    with torch.no_grad():
        for row, scores, ranks in zip(rows, output.predictions, output.label_ids, strict=True):
            expected = response_logps(run.model, RankedCollator(0)([row])).normalised()[0]
            n = len(row["ranks"])
            torch.testing.assert_close(torch.tensor(scores[:n]), expected, atol=logps_bound(run.model), rtol=0)
            assert ranks[:n].tolist() == row["ranks"]
            assert (scores[n:] == -100).all() and (ranks[n:] == -100).all()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_full_fine_tuning_trains_head_and_embeddings(tmp_path, family):
    run = trainer(make_model(family), tmp_path, make_rows(8), max_steps=20, learning_rate=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < first
    for name, parameter in run.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
