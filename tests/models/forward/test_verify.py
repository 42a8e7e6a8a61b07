"""The check of packed sequences: passes on exact models, and fails on one that ignores the mask."""

import pytest
import torch
from families import CHANGED_LOGITS, make_model, make_rows
from rounding import logps_bound

from tuna_peft import UserError
from tuna_peft.models.forward import verify
from tuna_peft.models.forward.verify import verify_packing

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_exact_models_pass_and_keep_their_mode(family):
    model = make_model(family).train()
    assert verify_packing(model, make_rows(1)[0], CPU) <= logps_bound(model)
    assert model.training


def test_a_model_that_ignores_the_mask_is_refused():
    model = make_model()
    forward = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UserError, match="llama: packed sequences give other log-probabilities"):
        verify_packing(model, make_rows(1, n=(3, 3))[0], CPU)


@pytest.mark.parametrize("family", CHANGED_LOGITS)
def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused(family):
    model = make_model(family, "eager" if family == "gemma2" else "sdpa")
    row = make_rows(1, n=(3, 3))[0]
    assert verify_packing(model, row, CPU) <= logps_bound(model)
    forward = model.lm_head.forward  # what `output_head` reads is right, and the model computes something else
    model.lm_head.forward = lambda hidden: forward(hidden) * 1.3
    with pytest.raises(UserError, match="changes its logits in a way that is not supported"):
        verify_packing(model, row, CPU)


@pytest.mark.parametrize("worst", [0, 1, 2])
def test_one_response_with_changed_logits_is_enough(worst, monkeypatch):
    model, row = make_model(), make_rows(1, n=(3, 3))[0]
    score, asked = verify._mean_logp, []

    def off_in_one(*args):
        asked.append(args)
        mean, _ = score(*args)
        return torch.stack([mean, torch.tensor(0.1 if len(asked) == worst + 1 else 0.0)])

    monkeypatch.setattr(verify, "_mean_logp", off_in_one)
    with pytest.raises(UserError, match="log-probabilities differ by 0.1 nats"):
        verify_packing(model, row, CPU)


@pytest.mark.parametrize("length", [1, 4, 100])
@pytest.mark.parametrize(("dtype", "of_one", "least"), [("bfloat16", 0.4, 0.05), ("float16", 0.1, 0.02)])
def test_short_responses_may_round_further(length, dtype, of_one, least, monkeypatch):
    model = make_model(max_position_embeddings=512).to(getattr(torch, dtype))
    row = make_rows(1, n=(2, 2), response=(length - 1, length - 1))[0] | {"completion_skips": [0, 0]}
    score = verify.response_logps
    bound = max(least, of_one / length**0.5)

    def off_by(difference):
        def found(model, batch):
            logps = score(model, batch)
            means = [verify._mean_logp(model, row["prompt_ids"], ids, 0, CPU)[0] for ids in row["completions_ids"]]
            logps.sums_BN = (torch.tensor(means)[None] + difference) * length
            return logps

        return found

    monkeypatch.setattr(verify, "response_logps", off_by(0.9 * bound))
    assert verify_packing(model, row, CPU) == pytest.approx(0.9 * bound, rel=0.01)
    monkeypatch.setattr(verify, "response_logps", off_by(1.1 * bound))
    with pytest.raises(UserError, match=f"over {length} tokens; rounding in {dtype} explains {bound:.3g}"):
        verify_packing(model, row, CPU)


@pytest.mark.parametrize(("dtype", "fix"), [("float16", "base.dtype: float32"), ("float32", "Check the weights")])
def test_a_model_that_overflows_gets_its_own_message(dtype, fix):
    model = make_model().to(getattr(torch, dtype))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e4 if dtype == "float16" else 3e38)
        model.model.layers[0].mlp.up_proj.weight.fill_(3e4)
    with pytest.raises(UserError, match=f"llama: log-probabilities are not finite in {dtype}") as error:
        verify_packing(model, make_rows(1)[0], CPU)
    assert fix in error.value.fix
