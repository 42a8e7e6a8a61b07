"""Packed sequences give the log-probabilities and gradients of separate sequences."""

import pytest
import torch
from families import CHANGED_LOGITS, FAMILIES, make_model, make_rows
from rounding import assert_rounded, gradient_operations, logps_bound

from tuna_peft import UserError
from tuna_peft.data.collate import RankedCollator
from tuna_peft.models.forward import prefix, scoring
from tuna_peft.models.forward.scoring import ResponseLogps, response_logps, stream_logps

LONGEST = 9  # tokens of a response of `make_rows`, with EOS


def separate_sequences(model, rows):
    """Summed log-probabilities, one plain forward pass per response, as the released code computes them."""
    sums = []
    for row in rows:
        for response, skip in zip(row["completions_ids"], row["completion_skips"], strict=True):
            ids = torch.tensor([row["prompt_ids"] + response])
            logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            picked = logps.gather(-1, ids[0, 1:, None]).squeeze(-1)
            sums.append(picked[len(row["prompt_ids"]) - 1 + skip :].sum())
    return torch.stack(sums)


def packed_sequences(model, rows, **collator):
    batch = RankedCollator(pad_token_id=0, **collator)(rows)
    logps = response_logps(model, batch)
    return logps.sums_BN[batch.ranks_BN >= 0], logps


@pytest.mark.parametrize("attention", ["dense mask", "segments", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate(family, attention, monkeypatch):
    monkeypatch.setattr(prefix, "LONG_ROW", 1 if attention == "segments" else 512)
    model = make_model(family, "eager" if attention == "eager" else "sdpa")
    rows = make_rows(2) + make_rows(2, vocabulary=3, seed=1)
    weights = torch.linspace(-1, 1, sum(len(row["ranks"]) for row in rows))
    gradients, values = [], []
    for score in (separate_sequences, lambda *args: packed_sequences(*args)[0]):
        model.zero_grad()
        value = score(model, rows)
        # A weight below the attention, whose gradient passes through every layer; the head's comes from the body.
        body = model.model.layers[0].self_attn.v_proj.weight
        (value * weights).sum().backward()
        values.append(value.detach())
        gradients.append(body.grad.clone())
    torch.testing.assert_close(*values, atol=logps_bound(model, LONGEST), rtol=0)
    assert_rounded(*reversed(gradients), gradient_operations(model))


def test_padding_and_other_prompts_do_not_matter():
    model, rows = make_model(), make_rows(5)
    together, _ = packed_sequences(model, rows)
    alone = torch.cat([packed_sequences(model, [row])[0] for row in rows])
    wide, _ = packed_sequences(model, rows, pad_to_multiple_of=64)
    bound = logps_bound(model, LONGEST)
    torch.testing.assert_close(together, alone, atol=bound, rtol=0)
    torch.testing.assert_close(together, wide, atol=bound, rtol=0)


def test_halves_of_a_batch_hold_the_same_responses():
    model = make_model()
    batch = RankedCollator(pad_token_id=0)(make_rows(3) + make_rows(2, vocabulary=3, seed=1))
    whole = response_logps(model, batch)
    parts = [response_logps(model, part) for part in batch.halves()]
    sums_BN = torch.cat([part.sums_BN for part in parts])
    torch.testing.assert_close(sums_BN, whole.sums_BN, atol=logps_bound(model, LONGEST), rtol=0)
    assert torch.equal(torch.cat([p.lengths_BN for p in parts]), whole.lengths_BN)


def test_lengths_and_normalisation():
    rows = make_rows(1, n=(3, 3))
    _, logps = packed_sequences(make_model(), rows)
    lengths = [
        len(ids) - skip for ids, skip in zip(rows[0]["completions_ids"], rows[0]["completion_skips"], strict=True)
    ]
    assert logps.lengths_BN[0].tolist() == lengths
    assert_rounded(logps.normalised(1.0), logps.sums_BN / logps.lengths_BN, 2)
    assert torch.equal(logps.normalised(0.0), logps.sums_BN)


@pytest.mark.parametrize("chunk_rows", [5, 256])
@pytest.mark.parametrize("family", [*CHANGED_LOGITS, "llama", "llama-tied"])
def test_every_weight_gets_the_gradient_of_the_models_own_logits(family, chunk_rows, monkeypatch):
    """Also the head and tied embeddings, and where the model scales or caps its logits."""
    monkeypatch.setattr("tuna_peft.models.forward.logps.CHUNK_ROWS", chunk_rows)
    model = make_model(family, "eager" if family == "gemma2" else "sdpa")
    rows = make_rows(4)
    weights = torch.linspace(-1, 1, sum(len(row["ranks"]) for row in rows))
    gradients, values = [], []
    for score in (separate_sequences, lambda *args: packed_sequences(*args)[0]):
        model.zero_grad()
        value = score(model, rows)
        (value * weights).sum().backward()
        values.append(value.detach())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*values, atol=logps_bound(model, LONGEST), rtol=0)
    for name, gradient in gradients[0].items():
        assert_rounded(gradients[1][name], gradient, gradient_operations(model), name=name)


def test_unsupported_output_layers_are_rejected():
    model = make_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="the output layer is a Sequential"):
        packed_sequences(model, make_rows())


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_batch_without_memory_is_split_and_nothing_is_lost(most, monkeypatch):
    def limited(model, batch):
        if len(batch.ranks_BN) > most:
            raise torch.OutOfMemoryError
        return ResponseLogps(batch.ranks_BN, batch.ranks_BN)

    monkeypatch.setattr(scoring, "response_logps", limited)
    rows = dict(zip("abcdefg", make_rows(7), strict=True))
    found = list(stream_logps(torch.nn.Linear(1, 1), RankedCollator(0), rows, ["abcde", "fg"]))
    assert "".join("".join(names) for names, _ in found) == "abcdefg"
    assert all(len(names) == len(logps.sums_BN) <= most for names, logps in found)
    with pytest.raises(UserError, match="does not fit into memory"):
        monkeypatch.setattr(
            scoring, "response_logps", lambda *_: limited(None, RankedCollator(0)(make_rows(most + 1)))
        )
        list(stream_logps(torch.nn.Linear(1, 1), RankedCollator(0), rows, ["ab"]))
