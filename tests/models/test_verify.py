"""The check of a run's first row: quiet where sharing is exact, loud where a model ignores the mask."""

import pytest
import torch
from families import make_model, make_rows

from tuna_peft import UserError
from tuna_peft.models.verify import verify_shared_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_exact_models_pass_and_keep_their_mode(family):
    model = make_model(family).train()
    assert verify_shared_rows(model, make_rows(1)[0], CPU) < 1e-5
    assert model.training


def test_a_model_that_ignores_the_mask_is_refused():
    model = make_model()
    forward = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UserError, match="llama: rows that share a prompt give other log-probabilities"):
        verify_shared_rows(model, make_rows(1, n=(3, 3))[0], CPU)
