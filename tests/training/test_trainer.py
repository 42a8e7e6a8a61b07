"""`TunaTrainer` on tiny models: the loss of the released code, and the invariants of training."""

import json

import pytest
import torch
from datasets import Dataset
from families import make_model, make_rows
from peft import LoraConfig
from rounding import assert_rounded, gradient_operations, logps_bound, rounded, rounding
from tiny_trainer import LORA, Tokens, config, quantised, stacked, trainer
from transformers import TrainerCallback

from tuna_peft import TunaTrainer, UserError
from tuna_peft.data.collate import RankedCollator, total_length
from tuna_peft.limits import UNPLANNED_TOKENS
from tuna_peft.models.base.load import make_quantization_config
from tuna_peft.models.forward.scoring import response_logps
from tuna_peft.models.stack.adapters import adapter_names, fingerprint
from tuna_peft.training.resume import latest_checkpoint


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


# Adam divides gradients by their own size, which enlarges the rounding of those that are nearly zero.
SGD = {"optim": "sgd", "learning_rate": 0.1}


def loss_bound(model, responses=4):
    """Of a loss over lists of so many responses: two scores for each pair, times `beta`, and the likelihood."""
    pairs = responses * (responses - 1) // 2
    return (pairs * 2 * 2 + 1) * logps_bound(model)


def assert_same_losses(run, found, expected):
    assert found == pytest.approx(expected, rel=0, abs=loss_bound(run.model))


def test_loss_is_that_of_the_released_code(tmp_path):
    """Equal N, no ties: separate sequences, full logits, MarginRankingLoss per gap plus token-mean cross-entropy."""
    rows = make_rows(3, n=(4, 4))
    for row in rows:
        row.update(ranks=[0, 1, 2, 3], completion_skips=[0] * 4)
    model = make_model()
    run = trainer(model, tmp_path, rows)
    [batch] = run.data_collator(rows)["micro_batches"]
    ours = run.compute_loss(run.model, batch)

    scores, nll, tokens = [], 0.0, 0
    for row in rows:
        for response in row["completions_ids"]:
            ids = torch.tensor([row["prompt_ids"] + response])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-len(response) :]
            scores.append(logps.mean())
            nll, tokens = nll - logps.sum(), tokens + len(response)
    scores = torch.stack(scores).view(3, 4)
    reference = nll / tokens
    for gap in range(1, 4):
        better, worse = scores[:, :-gap].flatten(), scores[:, gap:].flatten()
        reference = reference + torch.nn.MarginRankingLoss(0.1 * gap)(better, worse, torch.ones_like(better))
    torch.testing.assert_close(ours, reference, rtol=0, atol=loss_bound(model))


def test_learns_to_rank_in_four_bits_and_logs_it(base_folder, tmp_path):
    rows = make_rows(8, n=(3, 3))
    run = trainer(stacked(base_folder), tmp_path, rows, max_steps=20, per_device_train_batch_size=8)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert before["eval_ranking_accuracy"] < 0.85 and after["eval_ranking_accuracy"] > 0.95
    assert after["eval_loss"] < before["eval_loss"]
    entry = next(entry for entry in run.state.log_history if "loss" in entry)
    for key in ("rank_loss", "mle_loss", "ranking_accuracy", "margin_satisfaction", "scores/rank_0", "num_tokens"):
        assert key in entry
    assert entry["loss"] == rounded(entry["rank_loss"] + entry["mle_loss"], 2, entry["loss"])
    lengths = [len(RankedCollator(0).pack(row).tokens) for row in rows]
    assert len(set(lengths)) > 1  # so the batch has padding, which does not count
    assert run.state.num_input_tokens_seen == 20 * sum(lengths)


LOSSES = [
    {"reduction": reduction, "mle_on": mle_on}
    for reduction in ("gap_mean", "pair_sum")
    for mle_on in ("all", "best", "reference")
]
LOSSES += [{"loss_type": loss_type, "mle_on": "best"} for loss_type in ("logistic", "list_mle")]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(loss.values()))
def test_accumulation_does_not_change_the_loss(base_folder, tmp_path, loss):
    rows = make_rows(16)  # ragged: 2 to 4 responses, ties
    results = []
    for size, steps in ((8, 1), (1, 8)):
        run = trainer(stacked(base_folder), tmp_path, rows, max_steps=3, per_device_train_batch_size=size,
                      gradient_accumulation_steps=steps, **loss, **SGD)  # fmt: skip
        start = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        run.train()
        results.append(
            (
                losses(run),
                torch.cat(
                    [
                        (p - start[name]).detach().flatten()
                        for name, p in run.model.named_parameters()
                        if p.requires_grad
                    ]
                ),
            )
        )
    assert_same_losses(run, *(found for found, _ in results))
    (_, split), (_, whole) = results
    assert_rounded(split, whole, 3 * gradient_operations(run.model))


@pytest.mark.parametrize("budget", [60, 100])
def test_a_token_budget_does_not_change_the_loss(base_folder, tmp_path, budget):
    rows = make_rows(16) + make_rows(8, vocabulary=3, seed=1)
    results = []
    for max_tokens in (None, budget):
        run = trainer(
            stacked(base_folder),
            tmp_path,
            rows,
            max_steps=3,
            per_device_train_batch_size=8,
            max_tokens_per_batch=max_tokens,
            **SGD,
        )
        run.train()
        results.append(losses(run))
        seen = run.state.num_input_tokens_seen
    assert_same_losses(run, *results)
    micro_batches = run.data_collator(rows)["micro_batches"]
    assert len(micro_batches) > 3 and seen > 0
    assert all(batch.input_ids_BT.shape[0] * len(batch.input_ids_BT[0]) <= budget + 8 * 8 for batch in micro_batches)


def test_out_of_memory_splits_the_step_and_changes_nothing(base_folder, tmp_path, monkeypatch, caplog):
    whole_batches = []

    def out_of_memory(model, batch):
        """In the first of the two batches of each step: what it added to the metrics must not count twice."""
        logps = response_logps(model, batch)
        whole_batches.extend([batch] if len(batch.ranks_BN) > 2 else [])
        if len(batch.ranks_BN) > 2 and len(whole_batches) % 2:
            lowest = next(parameter for parameter in model.parameters() if parameter.requires_grad)

            def fail(gradient):  # late in the backward pass: the layers above have their gradients
                hook.remove()
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

            hook = lowest.register_hook(fail)
        return logps

    logs = []
    for scoring in (response_logps, out_of_memory):
        monkeypatch.setattr("tuna_peft.training.trainer.response_logps", scoring)
        settings = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **SGD}
        run = trainer(stacked(base_folder), tmp_path, make_rows(16), **settings)
        run.train()
        logs.append([entry for entry in run.state.log_history if "loss" in entry])
    assert "out of memory: repeating this step in 2 forward passes" in caplog.text
    for whole, split in zip(*logs, strict=True):
        norm = rounding(gradient_operations(run.model), whole["grad_norm"])
        assert whole == pytest.approx(split, rel=0, abs=max(norm, loss_bound(run.model)))


def test_outside_a_run_auto_is_a_fixed_budget_that_holds_the_longest_row(base_folder, tmp_path, monkeypatch):
    found = trainer(stacked(base_folder), tmp_path, make_rows(), max_tokens_per_batch="auto").data_collator
    assert found.max_tokens == UNPLANNED_TOKENS
    monkeypatch.setattr("tuna_peft.training.trainer.UNPLANNED_TOKENS", 1)
    found = trainer(stacked(base_folder), tmp_path, make_rows(), max_tokens_per_batch="auto").data_collator
    assert found.max_tokens == max(map(total_length, make_rows()))
    with pytest.raises(ValueError, match="use a number, or auto"):
        trainer(stacked(base_folder), tmp_path, make_rows(), max_tokens_per_batch="lots")


def test_a_budget_below_one_prompt_is_refused(base_folder, tmp_path):
    with pytest.raises(UserError, match="max_tokens_per_batch is 20") as error:
        trainer(stacked(base_folder), tmp_path, make_rows(), max_tokens_per_batch=20)
    assert error.value.where.startswith("row ")


def test_checkpointing_activations_does_not_change_the_loss(base_folder, tmp_path):
    runs = []
    for checkpointing in (False, True):
        run = trainer(stacked(base_folder), tmp_path, make_rows(8), max_steps=2, gradient_checkpointing=checkpointing,
                      **SGD)  # fmt: skip
        run.train()
        runs.append(losses(run))
    assert_same_losses(run, *runs)


class StopAfter(TrainerCallback):
    """Interrupts training after a step, like a crash."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_resuming_is_bit_identical_and_keeps_lower_adapters(base_folder, tmp_path, sampling):
    rows, names = make_rows(16), ("one", "two")
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5,  # 8 steps an epoch: resumes inside one
                "train_sampling_strategy": sampling}  # fmt: skip
    straight = trainer(stacked(base_folder, names), tmp_path / "straight", rows, **settings)
    below = fingerprint(straight.model, "one")
    straight.train()

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        trainer(stacked(base_folder, names), folder, rows, callbacks=[StopAfter(11)], **settings).train()
    (folder / "checkpoint-10" / "trainer_state.json").unlink()  # as if it had been interrupted while it was written
    checkpoint = latest_checkpoint(folder)
    assert checkpoint.name == "checkpoint-5"
    resumed = trainer(stacked(base_folder, names), folder, rows, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert fingerprint(resumed.model, "two") == fingerprint(straight.model, "two")
    assert fingerprint(resumed.model, "one") == below
    assert losses(resumed)[-4:] == losses(straight)[-4:]


def test_grouping_by_length_puts_similar_prompts_into_one_step(base_folder, tmp_path):
    """There is less padding, and the order depends on the seed."""

    def drawn(seed, sampling):
        run = trainer(stacked(base_folder), tmp_path, make_rows(128, n=(2, 9)), train_sampling_strategy=sampling,
                      per_device_train_batch_size=4, seed=seed)  # fmt: skip
        batches = [micro for batch in run.get_train_dataloader() for micro in batch["micro_batches"]]
        padding = sum(batch.input_ids_BT.numel() - len(batch.tokens_U) for batch in batches)
        return padding, [batch.input_ids_BT.flatten().tolist() for batch in batches]

    padding, order = drawn(0, "group_by_length")
    assert padding < 0.7 * drawn(0, "random")[0]
    assert drawn(0, "group_by_length")[1] == order != drawn(1, "group_by_length")[1]


def test_grouping_by_length_also_evaluates(base_folder, tmp_path):
    """`Trainer` uses that sampler for evaluation too, and ranked rows have no `input_ids` that it could measure."""
    rows = make_rows(16)
    expected = trainer(stacked(base_folder), tmp_path, rows).evaluate()
    found = trainer(stacked(base_folder), tmp_path, rows, train_sampling_strategy="group_by_length").evaluate()
    assert found["eval_ranking_accuracy"] == pytest.approx(expected["eval_ranking_accuracy"])


def test_a_checkpoint_is_a_whole_stack(base_folder, tmp_path):
    run = trainer(stacked(base_folder, ("one", "two")), tmp_path, make_rows(), max_steps=1, save_strategy="steps",
                  save_steps=1)  # fmt: skip
    run.train()
    manifest = json.loads((tmp_path / "checkpoint-1" / "stack.json").read_text())
    assert [entry["name"] for entry in manifest["adapters"]] == ["one", "two"]


def test_a_peft_model_with_a_new_config_becomes_a_stack(base_folder, tmp_path):
    run = TunaTrainer(
        stacked(base_folder), config(tmp_path, adapter_name="next"), train_dataset=Dataset.from_list(make_rows()),
        processing_class=Tokens(), peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    assert adapter_names(run.model) == ["one", "next"]
    assert {name.split(".")[-2] for name, p in run.model.named_parameters() if p.requires_grad} == {"next"}
    below = fingerprint(run.model, "one")
    run.train()
    assert fingerprint(run.model, "one") == below


def test_wrong_inputs(base_folder, tmp_path):
    rows = Dataset.from_list(make_rows())
    with pytest.raises(UserError, match="no parameter of the model is trainable"):
        trainer(quantised(base_folder), tmp_path, make_rows())
    with pytest.raises(UserError, match="quantized base cannot be trained"):
        TunaTrainer(str(base_folder), config(tmp_path), train_dataset=rows, processing_class=Tokens(),
                    quantization_config=make_quantization_config("nf4"))  # fmt: skip
    with pytest.raises(ValueError, match="reduction='sum': use one of gap_mean, pair_sum"):
        config(tmp_path, reduction="sum")
