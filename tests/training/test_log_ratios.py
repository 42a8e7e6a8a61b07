"""`reference: below`: log-ratios to the frozen stack below the adapter that trains, not to the bare base."""

import math

import pytest
import torch
from families import make_model, make_rows
from tiny_trainer import stacked, trainer

from tuna_peft import UserError
from tuna_peft.training.resume import latest_checkpoint

DPO = {"reference": "below", "loss_type": "logistic", "reduction": "pair_sum", "length_penalty": 0.0, "margin": 0.0,
       "beta": 0.1, "mle_weight": 0.0}  # fmt: skip
SETTINGS = {
    "dpo": DPO,
    "dpo-plackett-luce": {**DPO, "loss_type": "list_mle"},
    "mpo": {**DPO, "loss_type": "mpo"},
    "qrpo": {**DPO, "loss_type": "qrpo"},
}


def scored_rows(count, **options):
    rows = make_rows(count, **options)
    for row in rows:
        row["scores"] = [float(-rank) for rank in row["ranks"]]
    return rows


def summed_logps(model, row):
    """Separate sequences and full logits, with whatever adapters are active."""
    sums = []
    for response, skip in zip(row["completions_ids"], row["completion_skips"], strict=True):
        ids = torch.tensor([row["prompt_ids"] + response])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-len(response) :]
        sums.append(logps[skip:].sum().item())
    return sums


def slow_dpo(ratios_of_rows, rows):
    total = 0.0
    for ratios, row in zip(ratios_of_rows, rows, strict=True):
        for i in range(len(ratios)):
            for j in range(len(ratios)):
                if row["ranks"][i] < row["ranks"][j]:
                    total += math.log1p(math.exp(-0.1 * (ratios[i] - ratios[j])))
    return total / len(rows)


def slow_plackett_luce(ratios_of_rows, rows):
    total = 0.0
    for ratios, row in zip(ratios_of_rows, rows, strict=True):
        for i, rank in enumerate(row["ranks"]):
            rest = [ratios[j] for j, other in enumerate(row["ranks"]) if other > rank]
            total -= math.log(math.exp(0.1 * ratios[i]) / sum(math.exp(0.1 * r) for r in [ratios[i], *rest]))
    return total / len(rows)


@pytest.mark.parametrize(("name", "slow"), [("dpo", slow_dpo), ("dpo-plackett-luce", slow_plackett_luce)])
def test_the_reference_is_the_stack_below_and_not_the_base(base_folder, tmp_path, name, slow):
    """Both adapters are far from the identity, so that base, stack below and whole stack all differ."""
    rows = make_rows(5)
    model = stacked(base_folder, ("one", "second")).eval()
    with torch.no_grad():
        whole = [summed_logps(model, row) for row in rows]
        model.base_model.set_adapter(["one"])
        below = [summed_logps(model, row) for row in rows]
        with model.disable_adapter():
            base = [summed_logps(model, row) for row in rows]
    model.base_model.set_adapter(["one", "second"])
    model.set_requires_grad("one", False)

    def ratios(reference):
        return [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(whole, reference, strict=True)]

    run = trainer(model, tmp_path, rows, **SETTINGS[name])
    [batch] = run.data_collator(rows)["micro_batches"]
    ours = run.compute_loss(run.model, batch).item()
    assert ours == pytest.approx(slow(ratios(below), rows), rel=1e-4)
    assert abs(ours - slow(ratios(base), rows)) > 1e-2
    assert [p for p in run.model.active_adapters] == ["one", "second"]
    trains = {key.rpartition(".")[0].rpartition(".")[2] for key, p in run.model.named_parameters() if p.requires_grad}
    assert trains == {"second"}


def test_a_new_adapter_starts_with_log_ratios_of_zero(base_folder, tmp_path):
    model = stacked(base_folder, ("one", "second"))
    for key, parameter in model.named_parameters():
        if "lora_B.second" in key:
            torch.nn.init.zeros_(parameter)
    rows = make_rows(4, n=(3, 3))
    for row in rows:
        row["ranks"] = [0, 1, 2]
    run = trainer(model, tmp_path, rows, **DPO)
    [batch] = run.data_collator(rows)["micro_batches"]
    assert run.compute_loss(run.model, batch).item() == pytest.approx(3 * math.log(2), rel=1e-5)


LEARNING = {
    **SETTINGS,
    "nca": {**DPO, "loss_type": "nca"},
    "info-nca": {"loss_type": "info_nca", "mle_weight": 0.0},
    "lambda": {"loss_type": "logistic", "pair_weight": "lambda", "mle_weight": 0.0},
    "by-score": {"margin_by": "score", "mle_weight": 0.0},
}


@pytest.mark.parametrize("name", LEARNING)
def test_training_lowers_the_loss_of_its_rows(base_folder, tmp_path, name):
    rows = scored_rows(6, n=(3, 3))
    run = trainer(stacked(base_folder, ("one", "second")), tmp_path, rows, max_steps=8, learning_rate=3e-3,
                  per_device_train_batch_size=6, lr_scheduler_type="constant", **LEARNING[name])  # fmt: skip
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_rank_loss"] == pytest.approx(after["eval_loss"])


@pytest.mark.parametrize("name", SETTINGS)
def test_accumulation_packing_and_resuming_do_not_change_it(base_folder, tmp_path, name):
    rows = scored_rows(16)
    results = []
    for size, steps, more in ((8, 1, {}), (1, 8, {}), (8, 1, {"max_tokens_per_batch": 60})):
        run = trainer(stacked(base_folder, ("one", "second")), tmp_path / f"{size}-{len(more)}", rows, max_steps=3,
                      per_device_train_batch_size=size, gradient_accumulation_steps=steps, **SETTINGS[name],
                      **more)  # fmt: skip
        run.train()
        results.append(torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad]))
    # The same sums in another order; Adam divides each by its own size, which enlarges their rounding.
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-3, atol=2e-4)


def test_a_resumed_training_ends_with_the_same_bytes(base_folder, tmp_path):
    rows = make_rows(16)

    def make(**more):
        return trainer(stacked(base_folder, ("one", "second")), tmp_path, rows, max_steps=6, save_strategy="steps",
                       save_steps=3, per_device_train_batch_size=4, **DPO, **more)  # fmt: skip

    straight = make()
    straight.train()
    for path in tmp_path.glob("checkpoint-6"):
        path.rename(tmp_path / "kept")
    resumed = make()
    resumed.train(resume_from_checkpoint=str(latest_checkpoint(tmp_path)))
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_each_row_is_computed_once_and_without_dropout(base_folder, tmp_path, monkeypatch):
    from tuna_peft.training import reference

    calls, real = [], reference.response_logps

    def counted(model, batch):
        calls.append((len(batch.ranks_BN), model.training, list(model.active_adapters)))
        return real(model, batch)

    monkeypatch.setattr(reference, "response_logps", counted)
    run = trainer(stacked(base_folder, ("one", "second")), tmp_path, make_rows(4), max_steps=6, **DPO)
    run.train()  # three epochs
    assert calls == [(1, False, ["one"])] * 4 and run.model.training


def test_what_it_does_not_work_with(base_folder, tmp_path):
    with pytest.raises(UserError, match="needs an adapter"):
        trainer(make_model(), tmp_path, make_rows(2), reference="below")
    for options, message in (
        ({"loss_type": "nca"}, "defined on log-ratios: use reference='below'"),
        ({"loss_type": "qrpo"}, "defined on log-ratios"),
        ({"reference": "below", "margin": "auto"}, "all are 0 then"),
        ({"loss_type": "list_mle", "margin": "auto"}, "has none: use 'hinge' or 'logistic'"),
        ({"loss_type": "mpo", "margin_by": "score"}, "belongs to losses over pairs"),
        ({"loss_type": "mpo", "pair_weight": "lambda"}, "weights pairs"),
        ({"reference": "above"}, "reference='above': use one of none, below"),
        ({"margin": "large"}, "use a number or 'auto'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(stacked(base_folder), tmp_path, make_rows(2), **options)
    with pytest.raises(UserError, match="the loss uses scores, and row 0 has only ranks"):
        trainer(stacked(base_folder), tmp_path, make_rows(2), pair_weight="lambda")
